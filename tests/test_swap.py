"""Swaps go in, count, and come out without a trace."""

import sys
import timeit
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from kernbench import pipeline, registry, sites, swap
from kernbench import request as asked
from kernbench.errors import KernbenchError
from kernbench.progress import Silent
from kernbench.spec import Case, Cost, KernelSpec, Tolerance
from kernbench.workload import Phase, Swap, Workload


class Base:
    def inherited(self, x):
        return x + 1


class Owner(Base):
    factor = 3

    def method(self, x):
        return x * 2

    @staticmethod
    def static(x):
        return x - 1

    @classmethod
    def made(cls, x):
        return (cls.__name__, x)

    @property
    def size(self):
        return 4


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * self.weight


class FastNorm(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.weight = norm.weight

    def forward(self, x):
        return self.weight * x


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"norm": Norm(), "linear": nn.Linear(4, 4)}) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer["linear"](layer["norm"](x))
        return x


@dataclass(eq=False)
class Built:
    model: Any = field(default_factory=Model)
    units_per_step: float = 1.0

    def step(self, index):
        return self.model(torch.ones(2, 4)).sum()

    def state_dict(self):
        return self.model.state_dict()


def reference(x):
    return x * 2


def optimized(x):
    return x + x


SPEC = KernelSpec(
    name="double",
    reference=reference,
    optimized=optimized,
    make_inputs=lambda case, dtype, device, seed: {"x": torch.ones(case["rows"], dtype=dtype, device=device)},
    cases=(Case("ragged", rows=17),),
    tolerance={"float32": Tolerance()},
    cost=lambda case, dtype: Cost(flops=1, bytes_read=1, bytes_written=1),
)


def workload(*phases):
    planned = [Phase(number=number, title="t", swaps=tuple(swaps), predicts="p") for number, swaps in enumerate(phases)]
    return Workload(name="w", unit="u", summary="s", presets={"p": 1}, build=lambda **_: Built(), phases=tuple(planned))


def plan(*phases, use=None, numbers=None):
    declared = workload(*phases)
    chosen = range(len(phases)) if numbers is None else numbers
    return swap.plan(declared, list(chosen), use=use or {}, kernels={"double": SPEC}.__getitem__)


def fingerprint(*owners):
    return [dict(vars(owner)) for owner in owners]


def assert_untouched(before, *owners):
    for old, owner in zip(before, owners, strict=True):
        assert list(old) == list(vars(owner))
        assert all(vars(owner)[name] is value for name, value in old.items())


@pytest.mark.parametrize(
    ("name", "use", "call", "expected"),
    [
        ("method", lambda self, x: x * 20, lambda o: o.method(1), 20),
        ("inherited", lambda self, x: x + 10, lambda o: o.inherited(1), 11),
        ("static", lambda x: x - 10, lambda o: o.static(1), -9),
        ("static", lambda x: x - 10, lambda o: type(o).static(1), -9),
        ("made", lambda cls, x: (cls, x), lambda o: o.made(1), (Owner, 1)),
        ("size", lambda self: 40, lambda o: o.size, 40),
        ("size", property(lambda self: 41), lambda o: o.size, 41),
    ],
)
def test_attributes_of_every_kind_are_replaced_and_restored(name, use, call, expected):
    owner = Owner()
    original = call(owner)
    before = fingerprint(Base, Owner)
    planned = plan([Swap(site=(Owner, name), use=use)])
    applied = planned.applied(Built())
    for _ in range(3):
        with applied as receipt:
            assert call(owner) == expected
            kind = type(before[1].get(name, before[0].get(name)))
            assert type(vars(Owner)[name]) is kind
        assert call(owner) == original
        assert_untouched(before, Base, Owner)
    (hit,) = receipt.hits(3)
    assert (hit.site, hit.implementation, hit.calls, hit.calls_per_step) == (f"Owner.{name}", "python", 3, 1.0)


def test_dotted_sites_reach_functions_and_methods_of_modules():
    module = ModuleType("swap_test_module")
    module.Owner = type("Owner", (), {"method": lambda self: 1})
    module.function = lambda: 1
    sys.modules[module.__name__] = module
    try:
        planned = plan(
            [
                Swap(site="swap_test_module:Owner.method", use=lambda self: 2),
                Swap(site="swap_test_module:function", use=lambda: 2),
            ]
        )
        before = fingerprint(module, module.Owner)
        with planned.applied(Built()):
            assert (module.Owner().method(), module.function()) == (2, 2)
        assert (module.Owner().method(), module.function()) == (1, 1)
        assert_untouched(before, module, module.Owner)
        assert [hit.site for _, hit in planned.sites()] == ["Owner.method", "function"]
    finally:
        del sys.modules[module.__name__]


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ((Owner, "methid"), "did you mean 'method'"),
        ("no_such_module_here:f", "No module named"),
        ("torch.nn:Liner.forward", "'Liner' is no class"),
        ("torch.nn:Linear", "is a class"),
        ((Owner, "factor"), "holds a int"),
        ((int, "bit_length"), "built-in type int"),
    ],
)
def test_a_site_that_matches_nothing_is_an_error(site, message):
    with pytest.raises(KernbenchError, match=message):
        plan([Swap(site=site, use=lambda: 1)])


def test_unknown_phase_implementation_and_kernel_are_errors():
    swaps = [Swap(site=(Owner, "static"), kernel="double")]
    with pytest.raises(KernbenchError, match="no phase 7; its phases are 0"):
        plan(swaps, numbers=[7])
    with pytest.raises(KernbenchError, match="did you mean 'triton'"):
        plan(swaps, use={0: "tritn"})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((Owner, "method"), f"{__name__}:Owner.method"),
        ("layers.*.norm", "layers.*.norm"),
        ("layers.*.norm", "layers.1.*"),
        ("layers.0", "layers.*.norm"),
    ],
)
def test_two_phases_on_one_site_are_an_error_that_names_both(one, other):
    with pytest.raises(KernbenchError, match="phases 0 and 1 both claim site .*(as .* and .*)"):
        plan([Swap(site=one, use=FastNorm)], [Swap(site=other, use=FastNorm)]).applied(Built())


def test_phases_that_are_not_chosen_may_claim_the_same_site():
    swaps = [Swap(site=(Owner, "method"), use=lambda self, x: x)]
    assert plan(swaps, swaps, numbers=[1]).numbers == (1,)


@pytest.mark.parametrize("use", ["triton", "eager", "compile"])
def test_kernel_swaps_take_the_chosen_implementation(use, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: lambda x: function(x) + 100)
    planned = plan([Swap(site=(Owner, "method"), kernel="double", adapt=lambda f: lambda self, x: f(x))], use={0: use})
    assert planned.implementations == {0: use}
    assert planned.kernels == ((SPEC,) if use == "triton" else ())
    with planned.applied(Built()) as receipt:
        assert Owner().method(3) == (106 if use == "compile" else 6)
    assert receipt.hits(1)[0].kernel == "double"
    assert receipt.hits(1)[0].implementation == use


def test_module_glob_keeps_hooks_mode_and_order_and_is_undone():
    built = Built()
    model = built.model.eval()
    norms = [layer["norm"] for layer in model.layers]
    seen = []
    handle = norms[0].register_forward_hook(lambda *_: seen.append("hook"))
    planned = plan([Swap(site="layers.*.norm", use=FastNorm)])
    x = torch.randn(2, 4)
    before = model(x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    applied = planned.applied(built)
    for _ in range(2):
        with applied as receipt:
            inside = [layer["norm"] for layer in model.layers]
            assert all(isinstance(norm, FastNorm) and not norm.training for norm in inside)
            model(x)
            assert [name for name, _ in model.named_modules()] == names
        assert [layer["norm"] for layer in model.layers] == norms
        with planned.applied(built):
            assert [layer["norm"] for layer in model.layers] == inside
    assert seen == ["hook"] * 3
    assert receipt.hits(2)[0].calls == 4
    assert torch.equal(model(x), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with applied:
        handle.remove()
        model.train()
    assert not norms[0]._forward_hooks
    assert norms[0].training


def test_a_shared_module_gets_one_replacement():
    model = Model()
    model.layers[1]["norm"] = model.layers[0]["norm"]
    built = Built(model)
    with plan([Swap(site="layers.*.norm", use=FastNorm)]).applied(built):
        assert isinstance(model.layers[0]["norm"], FastNorm)
        assert model.layers[0]["norm"] is model.layers[1]["norm"]
    assert isinstance(model.layers[1]["norm"], Norm)


def test_a_glob_needs_a_match_a_model_and_a_new_module():
    with pytest.raises(KernbenchError, match="matches no module"):
        plan([Swap(site="layers.*.nrm", use=FastNorm)]).applied(Built())
    with pytest.raises(KernbenchError, match="no nn.Module named 'model'"):
        plan([Swap(site="layers.*.norm", use=FastNorm)]).applied(Built(model=None))
    with pytest.raises(KernbenchError, match="the module itself"):
        plan([Swap(site="layers.*.norm", use=lambda module: module)]).applied(Built())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exceptions_in_a_step_restore_everything(error):
    before = fingerprint(Owner)

    def raises(self, x):
        raise error

    with pytest.raises(error), plan([Swap(site=(Owner, "method"), use=raises)]).applied(Built()):
        Owner().method(1)
    assert_untouched(before, Owner)


def test_an_interrupt_between_any_two_lines_of_entering_and_leaving_restores_everything():
    """Interrupts once at every line that swap and sites execute on the way in and out."""
    built = Built()
    before = fingerprint(Owner, Base)
    norms = [layer["norm"] for layer in built.model.layers]
    planned = plan(
        [
            Swap(site=(Owner, "method"), use=lambda self, x: x),
            Swap(site=(Owner, "inherited"), use=lambda self, x: x),
            Swap(site="layers.*.norm", use=FastNorm),
        ]
    )
    applied = planned.applied(built)
    assert interrupts_at_every_line(lambda: use_once(applied)) > 30
    assert_untouched(before, Owner, Base)
    assert [layer["norm"] for layer in built.model.layers] == norms


def use_once(applied):
    with applied:
        Owner().method(1)


def interrupts_at_every_line(run):
    """Runs ``run`` again and again, raising KeyboardInterrupt one traced line later each time; returns the lines."""
    line = 0
    while True:
        line += 1
        left = line

        def tracer(frame, event, _):
            nonlocal left
            code = frame.f_code
            if code.co_filename not in (swap.__file__, sites.__file__):
                return None
            # Not guarded: the first lines, where nothing is in yet, or where no signal is handled (no call, no loop).
            unguarded = code.co_name in ("__enter__", "__exit__") and frame.f_lineno - code.co_firstlineno < 5
            if event == "line" and not unguarded:
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
            return tracer

        sys.settrace(tracer)
        try:
            run()
            return line
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)


def test_plans_nest_and_one_plan_serves_several_instances():
    inner = plan([Swap(site=(Owner, "method"), use=lambda self, x: "inner")])
    outer = plan([Swap(site=(Owner, "method"), use=lambda self, x: "outer")])
    with outer.applied(Built()):
        with inner.applied(Built()), inner.applied(Built()):
            assert Owner().method(1) == "inner"
        assert Owner().method(1) == "outer"
    assert Owner().method(1) == 2


def test_counting_costs_less_than_a_microsecond_and_survives_compile():
    def double(self, x):
        return x * 2

    planned = plan([Swap(site=(Owner, "method"), use=double)])
    owner, graphs = Owner(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with planned.applied(Built()) as receipt:
        compiled = torch.compile(lambda x: owner.method(x) + 1, backend=backend, fullgraph=True)
        for _ in range(4):
            assert compiled(torch.ones(2)).tolist() == [3, 3]
        assert len(graphs) == 1
        assert receipt.hits(4)[0].calls == 1
        counted = min(timeit.repeat(lambda: owner.method(1), number=20_000, repeat=7))
    plain = min(timeit.repeat(lambda: double(owner, 1), number=20_000, repeat=7))
    assert (counted - plain) / 20_000 < 1e-6


def test_annotated_names_every_site_and_leaves_nothing():
    planned = plan(
        [Swap(site=(Owner, "method"), use=lambda self, x: torch.ones(1))],
        [Swap(site=(Owner, "static"), use=lambda x: x), Swap(site="layers.*.norm", use=FastNorm)],
        [Swap(site=(Owner, "absent"), use=lambda x: x)],
        numbers=[0],
    )
    built = Built()
    before = fingerprint(Owner, *(layer["norm"] for layer in built.model.layers))
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler,
        swap.annotated(planned.workload, built, planned),
    ):
        Owner().method(1)
        Owner.static(1)
        built.step(0)
    counts = {event.key: event.count for event in profiler.key_averages() if event.key.startswith("kernbench.")}
    assert counts == {
        "kernbench.phase0:Owner.method": 1,
        "kernbench.phase1:Owner.static": 1,
        "kernbench.phase1:layers.*.norm": 2,
    }
    assert_untouched(before, Owner, *(layer["norm"] for layer in built.model.layers))


def test_annotated_tells_the_watcher_which_phase_runs():
    from kernbench.watching.syncwatch import current_phase

    seen = []
    planned = plan([Swap(site=(Owner, "method"), use=lambda self, x: seen.append(current_phase.get()))])
    with swap.annotated(planned.workload, Built(), planned):
        Owner().method(1)
        assert current_phase.get() is None
    assert seen == [0]


def test_an_empty_plan_changes_nothing():
    planned = plan()
    with planned.applied(Built(model=None)) as receipt:
        assert Owner().method(1) == 2
    assert (planned.numbers, planned.implementations, receipt.hits(1)) == ((), {}, [])


def needy(*needs):
    """A workload of two phases, the second of which needs others."""
    phases = [
        Phase(number=number, title=f"title {number}", predicts="nothing", needs=needs if number else (), swaps=())
        for number in (0, 1)
    ]
    return Workload(name="needy", unit="steps", summary="", presets={"tiny": {}}, build=Built, phases=tuple(phases))


def test_a_phase_goes_in_with_the_phases_that_it_needs():
    workload = needy(0)
    assert swap.plan(workload, [0, 1], use={}, kernels=str).numbers == (0, 1)
    with pytest.raises(KernbenchError, match="phase 1 of needy needs phase 0 in place: keep it first, or name all"):
        swap.plan(workload, [1], use={}, kernels=str)
    for needs in (1, 2):
        with pytest.raises(ValueError, match="phase 1 of workload 'needy' needs phases"):
            needy(needs)


def test_swap_all_leaves_a_phase_out_whose_needs_are_not_kept(toy_workspace, monkeypatch):
    file = toy_workspace / "workloads" / "toy.py"
    text = file.read_text()
    file.write_text(text.replace("number=1,", "number=1, needs=(0,),"))
    assert file.read_text() != text
    tried, notes, kept = [], [], {}

    class Noting(Silent):
        def note(self, text):
            notes.append(text)

    def tries(request, settings, number, *_):
        tried.append(number)

    monkeypatch.setattr(pipeline, "_swap", tries)
    monkeypatch.setattr(asked, "active", lambda *_: kept)
    request = asked.Request(command="kernbench swap --all", workload="toy", device="cpu", in_process=True)
    list(pipeline.swaps(request, None, Noting()))
    every = [phase.number for phase in registry.workload("toy").declaration.phases]
    assert tried == [number for number in every if number != 1]
    assert (
        [note for note in notes if "left out" in note] == [note for note in notes if "it needs phase 0" in note] != []
    )
    kept[0] = "python"
    tried.clear()
    list(pipeline.swaps(request, None, Noting()))
    assert tried == every[1:]

"""What the declaration of presynaptic attention cannot say: golden vectors, single gradients, layouts, operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernbench import device, registry
from kernbench.spec import Case, Inputs

DEVICE = device.resolve("auto")
SPEC = registry.kernel("presyn_attention").declaration
MODULE: Any = __import__("sys").modules[SPEC.optimized.__module__]


def golden() -> tuple[Tensor, Tensor, list[Tensor]]:
    """Inputs of the golden vectors, specification section 10: q, k [1, 2, 4, 8] and the initial state of profile P."""
    head, token, column = (
        torch.arange(size, dtype=torch.float64).view(shape)
        for size, shape in ((2, (2, 1, 1)), (4, (1, 4, 1)), (8, (1, 1, 8)))
    )
    q = torch.sin(0.3 + 0.5 * head + 0.8 * token + 0.37 * column)[None]
    k = torch.cos(0.1 + 0.4 * head + 0.6 * token + 0.53 * column)[None]
    values = (0.0, 0.0, 0.8, 0.2, 0.6, 0.5, 0.8)
    return q, k, [torch.full((1, 2, 4), value, dtype=torch.float64) for value in values]


def test_the_reference_repeats_the_golden_vectors_of_the_transposed_dock() -> None:
    q, k, state = golden()
    _, bias, (calcium, _, pool, reserve, primed, energy), _ = MODULE.released(q, k, state, dock="upstream")
    rows = [
        [-1.916681],
        [-2.288635, -1.729864],
        [-2.463218, -2.201494, -1.736888],
        [-2.343217, -2.572095, -2.262743, -1.751507],
    ]
    for query, row in enumerate(rows):
        assert bias[0, 0, query, : query + 1].tolist() == pytest.approx(row, abs=1e-6)
    assert bias[0, 0, 0, 1].item() == pytest.approx(-13.834261, abs=1e-6)
    expected = {
        "calcium": (calcium, [0.297598, 0.284517, 0.239657, 0.190749]),
        "pool": (pool, [0.267428, 0.351709, 0.45503, 0.583461]),
        "reserve": (reserve, [0.71282, 0.628539, 0.525218, 0.396787]),
        "primed": (primed, [0.586743, 0.590114, 0.594247, 0.599384]),
        "energy": (energy, [0.810527, 0.811285, 0.812215, 0.813371]),
    }
    for name, (got, wanted) in expected.items():
        assert got[0, 0].tolist() == pytest.approx(wanted, abs=1e-6), name


def drawn(dtype: torch.dtype = torch.float32, **sizes: int) -> Inputs:
    sizes = {"batch": 1, "heads": 2, "tokens": 21, "dim": 16, "noise": 0} | sizes
    return SPEC.make_inputs(Case("drawn", large=False, **sizes), dtype, DEVICE, 0)


def agreed(inputs: Inputs, chosen: list[int], rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Results and, of those chosen, gradients are the reference's."""
    sources = [leaf for leaf in inputs.values() if isinstance(leaf, Tensor) and leaf.requires_grad]
    found = []
    for function in (SPEC.reference, SPEC.optimized):
        results = function(**inputs)
        generator = torch.Generator(DEVICE).manual_seed(1)
        total = sum(
            (one * torch.randn(one.shape, generator=generator, device=DEVICE)).sum()
            for one in (results[index] for index in chosen)
        )
        found.append((results, torch.autograd.grad(total, sources, allow_unused=True)))
    (wanted, wanted_gradients), (got, got_gradients) = found
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol)
    for one, other in zip(got_gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("chosen", [[0], [1], [3, 6], [0, 2, 4, 5]], ids=str)
def test_results_have_gradients_one_by_one(chosen: list[int]) -> None:
    agreed(drawn(), chosen)


def test_logits_of_any_size_are_right() -> None:
    inputs = drawn(tokens=19)
    with torch.no_grad():
        inputs["q"] *= 12
        inputs["q"][:, :, 5:9] *= 8
    agreed(inputs, [0, 1, 4], rtol=1e-3, atol=2e-4)


def test_the_first_keys_gradients_are_more_exact_than_eagers_in_bfloat16() -> None:
    inputs = SPEC.make_inputs(
        Case("drawn", large=True, batch=2, heads=2, tokens=128, dim=16, noise=0), torch.bfloat16, DEVICE, 0
    )
    dy = torch.randn(inputs["q"].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def gradients(function: Any, dtype: torch.dtype | None) -> list[Tensor]:
        leaves = {name: leaf.detach().to(dtype or leaf.dtype).requires_grad_() for name, leaf in inputs.items()}
        y = function(**leaves)[0]
        return list(torch.autograd.grad(y, [leaves["pool"], leaves["energy"]], dy.bfloat16().to(y.dtype)))

    wanted = gradients(SPEC.reference, torch.float64)
    for exact, ours, eagers in zip(
        wanted, gradients(SPEC.optimized, None), gradients(SPEC.reference, None), strict=True
    ):
        first = slice(None), slice(None), slice(0, 8)
        assert (ours - exact)[first].square().sum() < 0.01 * (eagers - exact)[first].square().sum()


def test_empty_pools_leave_what_epsilon_gives() -> None:
    inputs = drawn()
    with torch.no_grad():
        inputs["pool"].zero_()
        inputs["reserve"].zero_()
    agreed(inputs, [0, 3, 4])


def test_pools_that_do_not_bind_and_pools_that_do() -> None:
    inputs = drawn(tokens=9)
    with torch.no_grad():
        inputs["clamp"][:, 0] = 0.0
    *_, used = SPEC.optimized(**inputs)
    full = 0.9753099 * inputs["pool"] + 0.04 * inputs["reserve"]
    binds = used >= full * 0.9999
    assert binds.any()
    assert not binds.all()
    agreed(inputs, list(range(7)))


def test_other_rates_count_each() -> None:
    inputs = drawn()
    rates = MODULE.Rates(*(value * 1.3 + 0.01 for value in MODULE.Rates()))
    inputs["rates"] = rates
    agreed(inputs, list(range(7)))


@pytest.mark.parametrize(
    ("share", "chosen", "dim"),
    [(0.0, [0, 1, 2, 3, 4, 5, 6], 16), (0.3, [0], 16), (0.3, [1, 2, 3, 4, 5, 6], 40), (1.0, [0, 2, 4], 40)],
)
def test_stochastic_release_draws_what_the_reference_draws(share: float, chosen: list[int], dim: int) -> None:
    """Rows of 16 and of 40 numbers take the two ways of the backward pass over keys."""
    inputs = drawn(noise=1, heads=1, dim=dim)
    inputs["rates"] = MODULE.Rates(stochastic_train_frac=share)
    agreed(inputs, chosen)


def test_a_seed_decides_what_is_drawn() -> None:
    inputs = drawn(noise=1)
    first, again = SPEC.optimized(**inputs)[0], SPEC.optimized(**inputs)[0]
    other = SPEC.optimized(**inputs | {"seed": inputs["seed"] + 1})[0]
    none = SPEC.optimized(**inputs | {"seed": None})[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, none)


def test_views_of_tokens_first_are_read_and_written_where_they_are() -> None:
    inputs = drawn(noise=1)
    for name in ("q", "k", "v"):
        inputs[name] = inputs[name].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    y, *_ = SPEC.optimized(**inputs)
    assert y.stride() == inputs["q"].stride()
    agreed(inputs, [0, 1])


def test_a_state_of_the_activations_dtype_is_taken() -> None:
    inputs = drawn(torch.float16)
    for name in ("calcium", "buffer", "pool", "reserve", "primed", "clamp", "energy"):
        inputs[name] = inputs[name].detach().half().requires_grad_()
    results = SPEC.optimized(**inputs)
    assert {one.dtype for one in results[:7]} == {torch.float16}
    agreed(inputs, [0, 1, 3], rtol=2e-2, atol=4e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 2, 20, 16)}, "one dtype and device"),
        ({"pool": torch.zeros(1, 2, 20)}, "pool is"),
        ({"energy": torch.zeros(1, 2, 21, dtype=torch.float64)}, "energy is"),
        ({"seed": torch.zeros(1)}, "one int64 as seed"),
        ({"rates": [80.0 if name == "barrier_strength" else 1.0 for name in MODULE.Rates._fields]}, "barrier_strength"),
    ],
    ids=["k", "pool", "energy", "seed", "rates"],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    changed = {name: one.to(DEVICE) if isinstance(one, Tensor) else one for name, one in change.items()}
    with pytest.raises(ValueError, match=message):
        SPEC.optimized(**(drawn() | changed))


def test_the_operator_is_registered_as_it_behaves() -> None:
    inputs = drawn(tokens=5)
    tensors = [one for one in inputs.values() if isinstance(one, Tensor)]
    arguments = (*tensors, list(MODULE.Rates()), None, True)
    torch.library.opcheck(torch.ops.kernbench.presyn_attention.default, arguments)


@pytest.mark.gpu
def test_memory_grows_with_tokens_and_not_with_their_square() -> None:
    peaks = []
    for tokens in (2048, 16384):
        inputs = drawn(torch.bfloat16, heads=12, tokens=tokens, dim=64)
        sources = [leaf for leaf in inputs.values() if isinstance(leaf, Tensor)]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = SPEC.optimized(**inputs)
        torch.autograd.grad(sum(one.float().sum() for one in results[:7]), sources)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 8.5 * peaks[0]


@triton.jit  # type: ignore[untyped-decorator]
def _exponentials(out, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program takes ROUNDS powers of two of each of BLOCK numbers, one after the other; out has the last ones."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = place.to(tl.float32) * 1e-6
    for _ in range(ROUNDS):
        x = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [-x], tl.float32, is_pure=True, pack=1)
    tl.store(out + place, x)


@pytest.mark.gpu
def test_the_forward_pass_takes_longer_than_its_special_functions() -> None:
    """The limit that they set, at the rate that this GPU was seen to do them: 1.5 a pair over keys, 2 over queries."""
    programs, block, rounds, pairs = 4096, 1024, 512, 4 * 12 * 2048 * 2049 / 2
    out = torch.empty(programs * block, device="cuda")
    milliseconds = triton.testing.do_bench(lambda: _exponentials[(programs,)](out, rounds, block, num_warps=4))
    # The fixed point of 2^-x, so that every round was done.
    torch.testing.assert_close(out, torch.full_like(out, 0.6411857), rtol=1e-4, atol=0)
    rate = programs * block * rounds / milliseconds
    inputs = drawn(torch.bfloat16, batch=4, heads=12, tokens=2048, dim=64)
    with torch.no_grad():
        taken = triton.testing.do_bench(lambda: SPEC.optimized(**inputs))
    limit = 3.5 * pairs / rate
    print(f"{rate * 1e3:.3g} exponentials a second: {limit:.3f} ms of {taken:.3f} ms forward")
    assert 0.05 < limit < taken

"""The one-row kernels beyond what their declarations say: every tile, a cache that fills, early launches, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kernbench import device, registry
from kernbench.spec import Case, Inputs, KernelSpec

DEVICE = device.resolve("auto")
LINEAR = ("decode_norm_linear", "decode_linear_add", "decode_gate_up")
KERNELS = (*LINEAR, "decode_attention", "decode_code_embedding", "decode_token")
EPS = 1e-6


def spec(name: str) -> KernelSpec:
    declaration: KernelSpec = registry.kernel(name).declaration
    return declaration


def module(name: str) -> ModuleType:
    return sys.modules[spec(name).optimized.__module__]


def configurations() -> list[Any]:
    decode: Any = module(LINEAR[0])._decode
    # Warps and columns go together, and in the interpreter warps do not matter.
    return [tiles for tiles in decode.CONFIGURATIONS if tiles.warps == 2]


def in_float64(inputs: Inputs) -> Inputs:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def test_the_interpreter_takes_few_programs_unless_tiles_are_given() -> None:
    decode: Any = module(LINEAR[0])._decode
    if not decode.INTERPRETED.value:
        pytest.skip("kernels are compiled here")
    assert decode.linear_plan(3000, 256, 4, None, {}).programs in range(2, 17)
    assert decode.linear_plan(3000, 256, 4, decode.Tiles(4, 256, 4), {}).programs == 750


@pytest.mark.parametrize("name", LINEAR)
def test_every_tile_gives_the_same_product(name: str) -> None:
    inputs = spec(name).make_inputs(Case("ragged", outputs=11, inner=601), torch.float32, DEVICE, 0)
    expected = spec(name).reference(**in_float64(inputs))
    assert len(configurations()) > 10
    for tiles in configurations():
        result = spec(name).optimized(**inputs, tiles=tiles)
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5, msg=str(tiles))


def test_tiles_of_the_tables_are_those_of_their_shapes() -> None:
    for name in LINEAR:
        for (rows, inner), tiles in module(name).TABLE.items():
            pair = 2 if name == "decode_gate_up" else 1
            chosen = module(name)._decode.linear_tiles(rows, inner, 2, module(name).TABLE, pair)
            assert chosen == tiles.fitted(inner)
            assert inner % chosen.columns == 0, "a tile of a known shape has no tail"


@pytest.mark.parametrize(("shares", "counted"), [((1, 16, 4), 0), ((4, 16, 4), 1), (None, 1)])
def test_a_cache_fills_from_its_first_row_on_and_nothing_behind_the_position_counts(
    shares: tuple[int, int, int] | None, counted: int
) -> None:
    case = Case("filling", kv_heads=2, group=2, length=140, dim=16, position=0, counted=counted)
    inputs = spec("decode_attention").make_inputs(case, torch.float32, DEVICE, 0)
    oracle = in_float64(inputs)
    for cache in ("key_cache", "value_cache"):
        inputs[cache].fill_(float("nan"))
        oracle[cache].zero_()
    generator = torch.Generator(DEVICE).manual_seed(1)
    places = (0, 1, 16, 17, 64, 139)
    seen = 0
    for place in places:
        # Rows between the places are those of tokens that the kernel has not seen itself.
        filler = torch.randn(2, place - seen, 16, device=DEVICE, generator=generator)
        for cache in ("key_cache", "value_cache"):
            inputs[cache][:, seen:place] = filler
            oracle[cache][:, seen:place] = filler.double()
        row = torch.randn(inputs["qkv"].shape, device=DEVICE, generator=generator)
        position = torch.tensor([place], device=DEVICE)
        before = inputs["key_cache"].clone()
        result = spec("decode_attention").optimized(**{**inputs, "qkv": row, "position": position}, shares=shares)
        expected = spec("decode_attention").reference(**{**oracle, "qkv": row.double(), "position": position})
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5, msg=f"at position {place}")
        rows = torch.arange(140, device=DEVICE) != place
        assert torch.equal(inputs["key_cache"][:, rows].nan_to_num(7.0), before[:, rows].nan_to_num(7.0))
        for cache in ("key_cache", "value_cache"):
            written = inputs[cache][:, place].double()
            torch.testing.assert_close(written, oracle[cache][:, place], rtol=1e-5, atol=1e-5)
        assert not counted or not inputs["arrived"].any(), "counters are zero again"
        seen = place + 1


def test_the_last_program_combines_shares_as_a_second_launch_does() -> None:
    case = Case("shares", kv_heads=1, group=2, length=70, dim=16, position=55, counted=1)
    results = []
    for arrived in (True, False):
        inputs = spec("decode_attention").make_inputs(case, torch.bfloat16, DEVICE, 0)
        if not arrived:
            inputs["arrived"] = None
        results.append(spec("decode_attention").optimized(**inputs, shares=(4, 16, 4)))
    assert torch.equal(*results)


def test_a_weight_with_more_columns_than_registers_hold_is_refused() -> None:
    inner = 2**16 + 1
    inputs = {"x": torch.zeros(inner), "weight": torch.zeros(1, inner), "residual": torch.zeros(1)}
    with pytest.raises(ValueError, match="at most 65536 numbers"):
        spec("decode_linear_add").optimized(**{name: value.to(DEVICE) for name, value in inputs.items()})


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("qkv", lambda x: x[1:], "takes qkv contiguous"),
        ("q_weight", lambda x: x.double(), "takes q_weight contiguous"),
        ("position", lambda x: x.int(), "takes a position"),
        ("cos", lambda x: x[:4], "takes tables"),
        ("sin", lambda x: x.double(), "takes tables"),
        ("key_cache", lambda x: x.transpose(0, 1), "decode_attention takes"),
        ("arrived", lambda x: x[:0], "takes counters"),
        ("arrived", lambda x: x.long(), "takes counters"),
    ],
)
def test_attention_says_which_tensor_does_not_fit(name: str, change: Callable[[Tensor], Tensor], words: str) -> None:
    case = Case("small", kv_heads=1, group=1, length=5, dim=16, position=2, counted=1)
    inputs = spec("decode_attention").make_inputs(case, torch.float32, DEVICE, 0)
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=words):
        spec("decode_attention").optimized(**inputs)


def logits_case(codes: int = 70, forced: int = 0) -> Case:
    return Case("codes", codes=codes, width=24, places=3, groups=4, forced=forced)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("places", "code"),
    [
        ({5: 9.0, 9: 9.0, 69: 9.0}, 5),
        ({8: float("inf"), 9: float("inf")}, 8),
        ({8: float("inf"), 40: float("nan"), 41: -float("nan")}, 40),
        (dict.fromkeys(range(70), float("-inf")), 0),
        (dict.fromkeys(range(70), -0.0) | {3: 0.0}, 0),
        (dict.fromkeys(range(70), -1.0) | {69: -0.5}, 69),
    ],
)
def test_the_first_of_equal_logits_is_the_code_and_nan_is_larger_than_all(
    dtype: torch.dtype, places: dict[int, float], code: int
) -> None:
    inputs = spec("decode_code_embedding").make_inputs(logits_case(), dtype, DEVICE, 0)
    for place, value in places.items():
        inputs["logits"][place] = value
    assert int(inputs["logits"].argmax()) == code
    row, _ = spec("decode_code_embedding").optimized(**inputs)
    assert int(inputs["codes"][2, 2]) == code
    assert torch.equal(row, inputs["embedding"][code])


def test_a_code_is_forced_where_it_is_not_negative_and_no_other_code_is_written() -> None:
    inputs = spec("decode_code_embedding").make_inputs(logits_case(forced=1), torch.float32, DEVICE, 0)
    before = inputs["codes"].clone()
    for forced in (0, 17, -1):
        inputs["forced"][2, 2] = forced
        row, total = spec("decode_code_embedding").optimized(**inputs)
        code = forced if forced >= 0 else int(inputs["logits"].argmax())
        before[2, 2] = code
        assert torch.equal(inputs["codes"], before)
        assert torch.equal(row, inputs["embedding"][code])
        assert torch.equal(total, inputs["total"] + row)


def test_every_way_to_cut_a_row_gives_the_same() -> None:
    decode = module("decode_code_embedding")
    inputs = spec("decode_code_embedding").make_inputs(
        Case("wide", codes=5000, width=300, places=1, groups=1, forced=0), torch.bfloat16, DEVICE, 0
    )
    expected = spec("decode_code_embedding").reference(**inputs)
    for blocks in (blocks for blocks in decode.CONFIGURATIONS if blocks.warps == 4):
        for result, row in zip(spec("decode_code_embedding").optimized(**inputs, blocks=blocks), expected, strict=True):
            assert torch.equal(result, row), str(blocks)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("logits", lambda x: x.double(), "takes logits contiguous"),
        ("embedding", lambda x: x[:60], "takes an embedding for each of 70"),
        ("codes", lambda x: x[:, :2], "takes codes contiguous"),
        ("position", lambda x: x.int(), "takes position contiguous"),
        ("forced", lambda x: x[:2], "takes forced contiguous"),
        ("group", lambda x: 4, "a column 4"),
    ],
)
def test_a_code_is_refused_with_the_tensor_that_does_not_fit(
    name: str, change: Callable[[Any], Any], words: str
) -> None:
    inputs = spec("decode_code_embedding").make_inputs(logits_case(forced=1), torch.float32, DEVICE, 0)
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=words):
        spec("decode_code_embedding").optimized(**inputs)


PTX = """
import json, sys
import torch
import triton
real = triton.compiler.compile
from kernbench import registry
from kernbench.compilation.launches import Recorder

recorder = Recorder()
sizes = {
    "outputs": 256, "inner": 1024, "kv_heads": 2, "group": 2, "length": 1024, "dim": 128, "position": 9,
    "codes": 256, "width": 1024, "places": 4, "groups": 16, "forced": 1, "top_k": 50, "percent": 90, "tenths": 9,
}
found = {}
for name in sys.argv[1:]:
    name, _, counted = name.partition("+")
    spec = registry.kernel(name).declaration
    case = spec.cases[0]
    case.sizes.update({size: sizes.get(size, int(bool(counted))) for size in case.sizes})
    inputs = spec.make_inputs(case, torch.bfloat16, torch.device("cpu"), 0)
    for arch in ("sm_80", "sm_90"):
        for overlap in (0, 1, 2):
            decode = sys.modules[spec.optimized.__module__]
            if name == "decode_attention":
                option = {"shares": decode.Shares(4, 32, 4, overlap)}
            elif name == "decode_code_embedding":
                option = {"blocks": decode.DEFAULT._replace(overlap=overlap)}
            elif name == "decode_token":
                option = {"ranks": decode.DEFAULT._replace(overlap=overlap)}
            else:
                option = {"tiles": decode.Tiles(4, 1024, 4, overlap=overlap)}
            with recorder.serving(arch, name, "bfloat16", "case"):
                spec.optimized(**inputs, **option)
            for launch in recorder.launches:
                ptx = real(launch.source, target=launch.target, options=launch.options).asm["ptx"]
                place = " ".join([launch.name, "of", name, *filter(None, [counted]), arch, str(overlap)])
                found[place] = (launch.options["launch_pdl"], ptx)
            recorder.launches.clear()
print(json.dumps(found))
"""
WAIT, LAUNCH, LOAD = "griddepcontrol.wait", "griddepcontrol.launch_dependents", "ld.global"


@pytest.fixture(scope="module")
def ptx() -> dict[str, tuple[bool, str]]:
    """What each launch is compiled to, and whether it is launched early, by name, architecture and overlap."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, "-c", PTX, *KERNELS, "decode_attention+counted"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found: dict[str, tuple[bool, str]] = json.loads(run.stdout)
    # Attention that nobody counts has two launches, and before Hopper all overlaps are one.
    assert len(found) == (len(KERNELS) + 2) * (1 + 3)
    return found


def test_kernels_wait_for_the_one_in_front_from_hopper_on_and_nowhere_else(ptx: dict[str, tuple[bool, str]]) -> None:
    for name, (early, code) in ptx.items():
        overlaps = "sm_90" in name and not name.endswith(" 0")
        assert early == overlaps, name
        assert (WAIT in code) == (LAUNCH in code) == overlaps, name


def test_the_next_kernel_may_start_where_the_overlap_says(ptx: dict[str, tuple[bool, str]]) -> None:
    for name, (early, code) in ptx.items():
        if early:
            assert (code.index(LAUNCH) < code.index(WAIT)) == name.endswith(" 2"), name


@pytest.mark.parametrize("name", LINEAR)
def test_weights_are_asked_for_before_the_wait_and_results_after(name: str, ptx: dict[str, tuple[bool, str]]) -> None:
    _, code = ptx[f"_kernel of {name} sm_90 2"]
    before, after = code.split(WAIT)
    rows = 8 if name == "decode_gate_up" else 4
    assert before.count(f"{LOAD}.L1") + before.count(f"{LOAD}.L2") >= rows, "a row takes one access of 16 bytes"
    assert "st.global" not in before
    assert LOAD in after and "st.global" in after


def test_the_cache_is_not_read_before_the_wait(ptx: dict[str, tuple[bool, str]]) -> None:
    before, after = ptx["_kernel of decode_attention sm_90 2"][1].split(WAIT)
    assert "prefetch.global.L2" in before and "prefetch" not in after
    assert "v4.b32" not in before and "v4.b32" in after, "rows of the cache are read 16 bytes at a time"
    assert "st.global" not in before


def test_a_program_counts_itself_after_all_its_threads_have_written(ptx: dict[str, tuple[bool, str]]) -> None:
    counting = ("decode_attention counted", "decode_token")
    assert not any("atom." in code for name, (_, code) in ptx.items() if not any(one in name for one in counting))
    for name in counting:
        before, after = ptx[f"_kernel of {name} sm_90 2"][1].split("atom.global.gpu.acq_rel.add")
        assert WAIT in before
        assert before.rindex("bar.sync") > before.rindex("st.global"), "a barrier between the last result and the count"
        assert after.index("bar.sync") < after.index(LOAD), "and one before results of others are read"
        assert "ld.global.cg" in after, "from the L2 cache"


def layers(count: int, hidden: int, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(shape, device=DEVICE, generator=generator)
        return drawn.div_(shape[-1] ** 0.5).to(dtype)

    return [
        {
            "norm": 1 + normal(hidden), "qkv": normal(32 * 128, hidden), "head_norm": 1 + normal(128),
            "output": normal(hidden, 16 * 128), "gate_up": normal(6 * hidden, hidden),
            "down": normal(hidden, 3 * hidden),
            "keys": torch.zeros(8, 1024, 128, dtype=dtype, device=DEVICE),
            "values": torch.zeros(8, 1024, 128, dtype=dtype, device=DEVICE),
            "arrived": torch.zeros(16, dtype=torch.int32, device=DEVICE),
        }
        for _ in range(count)
    ]  # fmt: skip


def frame(
    x: Tensor, stack: list[dict[str, Tensor]], tables: Tensor, position: Tensor, overlap: int, counted: bool
) -> Tensor:
    """One token through all layers, every kernel launched with this overlap."""
    norm_linear, linear_add, gate_up, attention = map(module, (*LINEAR, "decode_attention"))

    def tiles(rows: int, inner: int, name: str, pair: int = 1) -> Any:
        chosen = norm_linear._decode.linear_tiles(rows, inner, 2, module(name).TABLE, pair)
        return chosen._replace(overlap=overlap)

    hidden = x.numel()
    for layer in stack:
        qkv = norm_linear.decode_norm_linear(
            x, layer["norm"], layer["qkv"], EPS, tiles=tiles(32 * 128, hidden, "decode_norm_linear")
        )
        mixed = attention.decode_attention(
            qkv, layer["head_norm"], layer["head_norm"], tables, tables, layer["keys"], layer["values"], position, EPS,
            layer["arrived"] if counted else None,
            shares=attention.shares_for(1024)._replace(overlap=overlap),
        )  # fmt: skip
        x = linear_add.decode_linear_add(mixed, layer["output"], x, tiles=tiles(hidden, 16 * 128, "decode_linear_add"))
        activated = gate_up.decode_gate_up(
            x, layer["norm"], layer["gate_up"], EPS, tiles=tiles(3 * hidden, hidden, "decode_gate_up", 2)
        )
        x = linear_add.decode_linear_add(
            activated, layer["down"], x, tiles=tiles(hidden, 3 * hidden, "decode_linear_add")
        )
    return x


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [256, 1024])
def test_early_launches_change_no_bit_of_many_tokens_in_a_graph(hidden: int) -> None:
    results = []
    for overlap, counted in ((0, False), (0, True), (1, True), (2, True), (2, False)):
        stack = layers(6, hidden, torch.bfloat16)
        tables = torch.ones(1024, 64, dtype=torch.bfloat16, device=DEVICE)
        position = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        x = torch.randn(hidden, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(3)).bfloat16()
        frame(x, stack, tables, position, overlap, counted)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(2):
                y = frame(x, stack, tables, position, overlap, counted)
                x.copy_(y / y.float().square().mean().sqrt().to(y.dtype))
                position += 1
        for _ in range(100):
            graph.replay()
        results.append([x.clone(), *(layer[name].clone() for layer in stack for name in ("keys", "values"))])
    for one, other in pairwise(results):
        assert all(torch.equal(left, right) for left, right in zip(one, other, strict=True))
    assert bool(results[0][0].isfinite().all())

"""The nested optimizer's slow and fast momenta over any number of tensors in three launches, in place, nothing read.

    total_l = total_l + grad                                for every level l
    g = total_l / period^l; total_l = 0                     from here on for the active levels, the first ones
    average_l = beta1 average_l + (1 - beta1) g
    square_l = beta2 square_l + (1 - beta2) g^2
    u_l = network(logsign(g), logsign(momentum_l))          element by element
    m = 0.9 momentum_l + 0.1 u_l
    momentum_l = m min(1, 100 |g| / |m|)                    norms over the tensor
    p = p - lr (sum of u_l / sqrt(number of u_l) + weight_decay p)

A level whose u has NaN or Inf counts in neither of the last two lines; a tensor without a level that counts stays as it
is. logsign(x) is (ln|x| / 10, sign x) from |x| = e^-10 on, below it (-1, e^10 x). The network has ``layers`` linear
layers of ``width`` units with SiLU, and one that makes their sum. A false ``ok`` leaves every bit as it was.

The first launch evaluates the network with one element per thread lane and all activations in registers, leaves each u
where its total was, and one partial sum of each norm per block. The second adds those up in a fixed order. The third
moves momenta and parameters.

What bounds it: width 20 in 4 layers takes 1,300 multiply-adds and 160 exponentials and reciprocals an element and
level, and 60 bytes. Of the data sheet of an H200 (132 SMs at 1.98 GHz, 4.8 TB/s) 46.7 M elements need 1.8 ms for the
multiply-adds in float32, 1.8 ms for the special functions, which another unit computes, and 0.6 ms for the bytes; to
issue all instructions takes 2.8 ms. Tensor cores would need three passes of TF32 to be as exact, with 20 units padded
to 32 in both directions, which makes 2.0 ms, and 2.8 ms for SiLU of the padding: no faster.

Cast order: state and arithmetic are float32 (in the reference the state's dtype, so float64 inputs give an
oracle); p and grad are cast up when read, p is rounded once when stored. Contract: updates are so far from 3e38 that
the sum of finite ones is finite.

Source: nested optimizer of TitanMAC-Standalone (DeepNestedOptimizer, CMS mode), specification section 3.
Shapes: N tensors, L levels, E elements, F features.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernbench.spec import Case, Cost, Inputs, KernelSpec, Sizes, Tolerance, Values

from . import _cms, _pointer_table
from ._cms_plain import KINDS, LARGEST_SHARE, MOMENTUM_DECAY, PERIOD, fused_cms_reference, vectorised, weight_count
from ._pointer_table import Launch, Part

WIDEST, DEEPEST = 32, 8
BLOCK = 1024
WARPS = 4
PROPOSE_WARPS = 1
"""A warp with four elements a lane fills its registers, and waits for no other one."""
JUDGE_BLOCK = 1024
INTERPRETED = not isinstance(_cms.propose_kernel, triton.JITFunction)
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
# In the interpreter two steps a block are less to wait for.
STEP = BLOCK // 2 if INTERPRETED else 128 * PROPOSE_WARPS
# Where the blocks of each tensor end among those of its part; laid out with the part, and gone with it.
_ends: WeakKeyDictionary[Part, Tensor] = WeakKeyDictionary()


def fused_cms(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    weights: Tensor,
    lrs: Tensor,
    ok: Tensor,
    active: int,
    width: int,
    layers: int,
    weight_decay: float,
    beta1: float,
    beta2: float,
) -> None:
    """Updates parameters and state in place; no host sync.

    The first call for given parameters and state lays out what the launches need, and waits for the device once. Make
    it before capturing a CUDA graph.

    Args:
        params: N parameters of any shape, contiguous, float32 or bfloat16, on one device.
        grads: their gradients, same shapes and dtypes, contiguous.
        states: per parameter [4, L, *shape], float32, contiguous: momentum, total, average and square of each level.
        weights: of the network, float32: layer by layer a matrix [outputs, inputs] and its biases.
        lrs: learning rates, [N], float32.
        ok: 0-dim bool. Where it is false nothing changes, whatever the gradients hold.
        active: levels that are due in this step: 1 in most, 2 in every tenth, 3 in every hundredth.
        width: units of a layer of the network, at most 32.
        layers: of the network, at most 8, the output not counted.
        weight_decay: decay per unit of learning rate.
        beta1: share of the average that stays, in [0, 1).
        beta2: share of the square that stays, in [0, 1).

    Raises:
        ValueError: the lists differ in length, or an argument has another shape, dtype, layout, device or range than
            said here.
        RuntimeError: captured in a CUDA graph without a call before it.
    """
    torch.ops.kernbench.fused_cms.default(
        params, grads, states, weights, lrs, ok, active, width, layers, weight_decay, beta1, beta2
    )


def _launch(
    params: list[Tensor], grads: list[Tensor], states: list[Tensor], weights: Tensor, lrs: Tensor, ok: Tensor,
    active: int, width: int, layers: int, weight_decay: float, beta1: float, beta2: float,
) -> None:  # fmt: skip
    if not len(params) == len(grads) == len(states):
        raise ValueError(
            f"fused_cms got {len(params)} params, {len(grads)} grads and {len(states)} states; give one of each per "
            "parameter"
        )
    if not params:
        return
    if not (1 <= width <= WIDEST and 1 <= layers <= DEEPEST):
        raise ValueError(
            f"fused_cms keeps all activations in registers: give a width of 1 to {WIDEST} and 1 to {DEEPEST} layers, "
            f"not {width} and {layers}"
        )
    levels = states[0].shape[1] if states[0].dim() > 1 else 0
    group = _pointer_table.group_of(
        (params, states), functools.partial(_check_state, params, states, levels), _launch_for
    )
    check_grads = functools.partial(_pointer_table.check_each, "grads", grads, params)
    if not all(map(Tensor.is_contiguous, grads)):
        check_grads()
    table = group.table(grads, check_grads)
    device = group.device
    _pointer_table.check("weights", weights, (weight_count(width, layers),), torch.float32, device)
    _pointer_table.check("lrs", lrs, (len(params),), torch.float32, device)
    _pointer_table.check("ok", ok, (), torch.bool, device)
    if not 1 <= active <= levels:
        raise ValueError(f"fused_cms has {levels} levels and cannot have {active} active; give 1 to {levels}")
    # Every matrix then starts at a multiple of eight bytes.
    paired = width % 2 == 0 and weights.data_ptr() % 8 == 0
    verdicts = torch.empty(len(params), levels, dtype=torch.float32, device=device)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for part in group.parts:
            chunks, dtype = part.chunks, TRITON_DTYPES[part.dtype]
            partials = torch.empty(len(chunks), levels, _cms.PARTIALS.value, dtype=torch.float32, device=device)
            _cms.propose_kernel[(len(chunks),)](
                chunks, table.rows, weights, partials, ok, active, PERIOD, beta1, beta2, MOMENTUM_DECAY,
                levels, width, layers, _pointer_table.TENSOR_BITS, dtype, part.launch.block, STEP, paired,
                INTERPRETED, num_warps=PROPOSE_WARPS,
            )  # fmt: skip
            _cms.judge_kernel[(len(params), active)](
                _ends_of(part, params), partials, verdicts, ok, LARGEST_SHARE, levels, JUDGE_BLOCK
            )
            _cms.apply_kernel[(len(chunks),)](
                chunks, table.rows, verdicts, lrs, ok, active, weight_decay, MOMENTUM_DECAY,
                levels, _pointer_table.TENSOR_BITS, dtype, part.launch.block, INTERPRETED, num_warps=part.launch.warps,
            )  # fmt: skip
    torch.autograd.graph.increment_version(params)


def _launch_for(elements: int) -> Launch:
    return Launch(block=BLOCK, warps=WARPS)


def _ends_of(part: Part, params: list[Tensor]) -> Tensor:
    if part not in _ends:
        sizes = [param.numel() if param.dtype == part.dtype else 0 for param in params]
        counts = (torch.tensor(sizes) + (part.launch.block - 1)) // part.launch.block
        _ends[part] = counts.cumsum(0).to(part.chunks.device)
    return _ends[part]


def _check_state(params: list[Tensor], states: list[Tensor], levels: int) -> None:
    device = params[0].device
    for index, (param, state) in enumerate(zip(params, states, strict=True)):
        if param.dtype not in TRITON_DTYPES or not param.is_contiguous() or param.device != device:
            raise ValueError(
                "fused_cms takes contiguous float32 or bfloat16 params, all on one device; "
                f"number {index} is {_pointer_table.described(param)}"
            )
        _pointer_table.check("states", state, (KINDS, levels, *param.shape), torch.float32, device, index)


_LIBRARY = torch.library.Library("kernbench", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "fused_cms(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor weights, Tensor lrs, Tensor ok, "
    "int active, int width, int layers, float weight_decay, float beta1, float beta2) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)
for _key, _implementation in {"CPU": _launch, "CUDA": _launch, "Meta": lambda *_: None}.items():
    _LIBRARY.impl("fused_cms", _implementation, _key)  # type: ignore[no-untyped-call]


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Parameters with three levels of state from the middle of a run; to be skipped, or not."""
    generator = torch.Generator(device).manual_seed(seed)
    state_dtype = torch.promote_types(dtype, torch.float32)

    def normal(shape: Sequence[int], scale: float, like: torch.dtype) -> Tensor:
        return (torch.randn(shape, device=device, generator=generator) * scale).to(like)

    shapes = _shapes(case)
    states = [normal((KINDS, LEVELS, *shape), 1e-2, state_dtype) for shape in shapes]
    for state in states:
        # Momenta of one tensor in two are long, so that they are cut; level 0 totals nothing from step to step.
        state[1, 0].zero_()
        state[3].square_()
    for state in states[::2]:
        state[0].mul_(1e3)
    width, layers = _network_of(case)
    weights = normal((weight_count(width, layers),), 0.5, state_dtype)
    # Updates so short that each leaves a momentum about where it was. Where a longer one nearly cancels it, features
    # multiply the rounding by up to e^10, the next update by that again, and after ten nobody is right.
    weights[-width - 1 :].mul_(SHORT)
    count = torch.arange(len(shapes), device=device)
    return {
        "params": [normal(shape, 0.05, dtype) for shape in shapes],
        "grads": [normal(shape, 1e-2, dtype) for shape in shapes],
        "states": states, "weights": weights,
        "lrs": torch.where(count % 3 == 0, 2e-3 / SHORT, 6e-4 / SHORT).to(state_dtype),
        "ok": torch.tensor(not case["skip"], device=device), "active": case["active"], "width": width,
        "layers": layers, "weight_decay": 5 * SHORT, "beta1": 0.9, "beta2": 0.999,
    }  # fmt: skip


def next_inputs(inputs: Inputs, seed: int) -> None:
    """The gradients of the next update, in place."""
    generator = torch.Generator(inputs["ok"].device).manual_seed(seed)
    for grad in inputs["grads"]:
        grad.normal_(0.0, 1e-2, generator=generator)


LEVELS = 3
SHORT = 4e-5
"""Scale of the network's last layer; learning rates are larger in return, and decay smaller."""
NETWORKS = ((1, 1), (2, 1), (3, 2), (20, 4))
"""Width and layers by number, from the smallest to the one that the nested optimizer has."""


def _network_of(case: Case) -> tuple[int, int]:
    return NETWORKS[min(case["network"], len(NETWORKS) - 1)]


def _shapes(case: Case) -> list[tuple[int, ...]]:
    edges = [(), (0,), (1,), (17,)] if case["edges"] else []
    table = [(case["rows"], case["side"])] if case["rows"] else []
    side = case["side"]
    return [*edges, *[(side, side)] * case["squares"], *[(side,)] * case["vectors"], *table]


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """Gradient, parameter, all totals, and momentum, average and square of the active levels once each way."""
    elements = 0 if case["skip"] else sum(math.prod(shape) for shape in _shapes(case))
    state_bytes = max(dtype.itemsize, 4)
    written = dtype.itemsize + state_bytes * (LEVELS + 3 * case["active"])
    multiply_adds = weight_count(*_network_of(case))
    return Cost(
        flops=2.0 * multiply_adds * case["active"] * elements,
        bytes_read=float((written + dtype.itemsize) * elements),
        bytes_written=float(written * elements),
    )


SPEC = KernelSpec(
    name="fused_cms",
    reference=fused_cms_reference,
    optimized=fused_cms,
    make_inputs=make_inputs,
    cases=(
        Case("few", edges=0, squares=0, vectors=1, side=17, rows=0, active=1, skip=0, network=1),
        Case("one", edges=0, squares=0, vectors=1, side=1, rows=0, active=1, skip=0, network=0),
        Case("ragged", edges=1, squares=0, vectors=0, side=29, rows=19, active=2, skip=0, network=2),
        Case("levels", edges=0, squares=0, vectors=2, side=33, rows=0, active=3, skip=0, network=1),
        Case("whole", edges=0, squares=0, vectors=0, side=61, rows=8, active=1, skip=0, network=3),
        Case("skipped", edges=0, squares=1, vectors=1, side=23, rows=0, active=2, skip=1, network=1),
        Case(
            "matrix",
            large=True,
            edges=0,
            squares=1,
            vectors=0,
            side=2048,
            rows=0,
            active=1,
            skip=0,
            network=3,
        ),
        Case(
            "seed",
            large=True,
            edges=0,
            squares=80,
            vectors=40,
            side=512,
            rows=50257,
            active=1,
            skip=0,
            network=3,
        ),
        Case(
            "hundredth",
            large=True,
            edges=0,
            squares=80,
            vectors=40,
            side=512,
            rows=50257,
            active=3,
            skip=0,
            network=3,
        ),
    ),
    tolerance={"float32": Tolerance(), "bfloat16": Tolerance()},
    cost=cost,
    mutates=("params", "states"),
    stateful=True,
    next_inputs=next_inputs,
    sizes={
        "edges": Sizes(most=1),
        "squares": Sizes(most=1),
        "vectors": Sizes(most=2),
        "side": Sizes(least=1, most=29, block=math.isqrt(BLOCK)),
        "rows": Sizes(most=20),
        "active": Sizes(least=1, most=LEVELS),
        "skip": Sizes(most=1),
        "network": Sizes(most=2),
    },
    values={
        "grads": Values(least=-1e15, most=1e15, nonfinite=True),
        "states": Values(least=-1e15, most=1e15),
        "weights": Values(least=-1e3, most=1e3),
        "lrs": Values(fixed=True),
    },
    peers={"torch.compile, vectorised": vectorised},
    source="DeepNestedOptimizer of TitanMAC-Standalone in CMS mode",
)

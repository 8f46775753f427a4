"""AdamW over any number of tensors in two launches, in place, with step counters and learning rates on the device.

    t = step + 1
    m = m + (g - m) * (1 - beta1)
    v = v * beta2 + (1 - beta2) * g * g
    p = p * (1 - lr * weight_decay) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

The first launch is tiny: it advances the counters and leaves three factors per tensor. The second updates all elements:
one program handles one block of one tensor. It reads its entry of a chunk list, the tensor's addresses from a table in
device memory, then p, g, m and v once: 28 bytes a parameter in float32, stores included.

Cast order: state and arithmetic are float32 (in the reference the state's dtype, so float64 inputs give an oracle); p
and g are cast up when read, p is rounded once when stored. The bias corrections are computed in float64 and then
rounded, because 1 - beta2^t in float32 has lost four of its seven digits at t = 1.

A false ``ok`` leaves every bit as it was, so that a step with a NaN gradient is skipped without asking the device.

Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019, algorithm 2, as torch.optim.AdamW has it.
Shapes: N tensors.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from kernbench.spec import Case, Cost, Inputs, KernelSpec, Sizes, Tolerance, Values

from . import _adamw_peers, _pointer_table, _shared
from ._pointer_table import Launch


@torch.no_grad()
def fused_adamw_reference(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: Tensor,
    lrs: Tensor,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
    ok: Tensor,
) -> None:
    """The update in plain PyTorch, without a branch on ``ok``; arguments as in :func:`fused_adamw`."""
    dtype = exp_avgs[0].dtype if exp_avgs else torch.float32
    exact_steps = steps.double() + 1
    decays = (1 - lrs.double() * weight_decay).to(dtype)
    step_sizes = (lrs.double() / (1 - beta1**exact_steps)).to(dtype)
    roots = (1 - beta2**exact_steps).sqrt().to(dtype)
    tensors = zip(params, grads, exp_avgs, exp_avg_sqs, decays, step_sizes, roots, strict=True)
    for param, grad, exp_avg, exp_avg_sq, decay, step_size, root in tensors:
        gradient = grad.to(dtype)
        first = torch.lerp(exp_avg, gradient, 1 - beta1)
        second = torch.addcmul(exp_avg_sq * beta2, gradient, gradient, value=1 - beta2)
        updated = param.to(dtype) * decay - step_size * (first / (second.sqrt() / root + eps))
        param.copy_(torch.where(ok, updated.to(param.dtype), param))
        exp_avg.copy_(torch.where(ok, first, exp_avg))
        exp_avg_sq.copy_(torch.where(ok, second, exp_avg_sq))
    steps.copy_(torch.where(ok, steps + 1, steps))


@triton.jit(do_not_specialize=["tensors"])  # type: ignore[untyped-decorator]
def _advance_kernel(  # type: ignore[no-untyped-def]
    steps, lrs, ok, factors, tensors, weight_decay,
    LOG2_BETA1: tl.constexpr, LOG2_BETA2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program handles BLOCK tensors: advances steps [N] and fills factors [N, 4]; grid is N / BLOCK, rounded up."""
    if not tl.load(ok):
        return
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < tensors
    step = tl.load(steps + index, mask=mask, other=0.0) + 1.0
    lr = tl.load(lrs + index, mask=mask, other=0.0).to(tl.float64)
    bias1 = 1.0 - tl.exp2(step.to(tl.float64) * tl.full([], LOG2_BETA1, tl.float64))
    bias2 = 1.0 - tl.exp2(step.to(tl.float64) * tl.full([], LOG2_BETA2, tl.float64))
    tl.store(steps + index, step, mask=mask)
    tl.store(factors + index * 4, (1.0 - lr * weight_decay).to(tl.float32), mask=mask)
    tl.store(factors + index * 4 + 1, (lr / bias1).to(tl.float32), mask=mask)
    tl.store(factors + index * 4 + 2, (1.0 / tl.sqrt(bias2)).to(tl.float32), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _update(  # type: ignore[no-untyped-def]
    param, grad, exp_avg, exp_avg_sq, offsets, mask, factors, beta1_complement, beta2, beta2_complement, eps,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Updates one tensor, whose factors [3] are given, at offsets [BLOCK] where mask [BLOCK] allows it."""
    g = tl.load(grad + offsets, mask=mask).to(tl.float32)
    m = tl.load(exp_avg + offsets, mask=mask)
    v = tl.load(exp_avg_sq + offsets, mask=mask)
    p = tl.load(param + offsets, mask=mask).to(tl.float32)
    decay = tl.load(factors)
    step_size = tl.load(factors + 1)
    inverse_root = tl.load(factors + 2)
    m += (g - m) * beta1_complement
    # In the order of torch.addcmul: g * g on its own overflows from 1.8e19 on.
    v = v * beta2 + beta2_complement * g * g
    p = p * decay - step_size * (m / (tl.sqrt(v) * inverse_root + eps))
    if INTERPRETED and param.dtype.element_ty == tl.bfloat16:
        p = _shared.nearest_bfloat16(p)
    tl.store(exp_avg + offsets, m, mask=mask)
    tl.store(exp_avg_sq + offsets, v, mask=mask)
    tl.store(param + offsets, p.to(param.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _update_kernel(  # type: ignore[no-untyped-def]
    chunks, table, factors, ok, beta1_complement, beta2, beta2_complement, eps,
    TENSOR_BITS: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program handles one block of one tensor, named by its entry of chunks [C]; grid is C.

    Table [N, 5] has the addresses, factors [N, 4] what the advance left. A whole block with all addresses multiples of
    16 bytes takes four elements a thread and access; another one takes one, in a loop, which needs few registers.
    """
    if not tl.load(ok):
        return
    chunk = tl.load(chunks + tl.program_id(0))
    tensor = chunk & ((1 << TENSOR_BITS) - 1)
    start = (chunk >> TENSOR_BITS) * BLOCK
    row = table + tensor * 5
    param_address = tl.load(row)
    exp_avg_address = tl.load(row + 1)
    exp_avg_sq_address = tl.load(row + 2)
    count = tl.load(row + 3)
    grad_address = tl.load(row + 4)
    factors += tensor * 4
    param = param_address.to(tl.pointer_type(DTYPE))
    grad = grad_address.to(tl.pointer_type(DTYPE))
    exp_avg = exp_avg_address.to(tl.pointer_type(tl.float32))
    exp_avg_sq = exp_avg_sq_address.to(tl.pointer_type(tl.float32))
    aligned = ((param_address | exp_avg_address | exp_avg_sq_address | grad_address) & 15) == 0
    if aligned & (start + BLOCK <= count):
        # Divisible by four elements, no more: wider bfloat16 accesses would be exchanged with the layout of the state.
        WIDTH: tl.constexpr = DTYPE.primitive_bitwidth // 2
        _update(
            tl.multiple_of(param + start, WIDTH), tl.multiple_of(grad + start, WIDTH),
            tl.multiple_of(exp_avg + start, 16), tl.multiple_of(exp_avg_sq + start, 16), tl.arange(0, BLOCK), None,
            factors, beta1_complement, beta2, beta2_complement, eps, INTERPRETED,
        )  # fmt: skip
    else:
        for first in range(0, BLOCK, THREADS):
            offsets = start + first + tl.arange(0, THREADS)
            _update(
                param, grad, exp_avg, exp_avg_sq, offsets, offsets < count,
                factors, beta1_complement, beta2, beta2_complement, eps, INTERPRETED,
            )  # fmt: skip


CACHED_ELEMENTS = 2**21
"""Up to here the 28 bytes a parameter fit the 50 MB L2 of an H100 or H200, and the next step finds them there."""
CACHED = Launch(block=1024, warps=4)
# Of 19 variants the fastest on one H200; evict_first loads and streaming stores cost 1 to 5 % there.
STREAMED = Launch(block=512, warps=4)
ADVANCE_BLOCK = 128
INTERPRETED = not isinstance(_update_kernel, triton.JITFunction)
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def fused_adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: Tensor,
    lrs: Tensor,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
    ok: Tensor,
) -> None:
    """Updates parameters, moments and step counters in place; no host sync.

    The first call for given parameters and state lays out what the launches need, and waits for the device once. Make
    it before capturing a CUDA graph. Every replay reads the gradients at the captured addresses, so they must stay
    there; those of a backward pass in the same graph do.

    Args:
        params: N parameters of any shape, contiguous, float32, bfloat16 or float16, on one device.
        grads: their gradients, same shapes and dtypes, contiguous.
        exp_avgs: first moments m, float32, contiguous.
        exp_avg_sqs: second moments v, float32, contiguous.
        steps: updates done so far, [N], float32; advanced by one.
        lrs: learning rates, [N], float32.
        weight_decay: decay per unit of learning rate, decoupled from the gradient.
        beta1: share of m that stays, in [0, 1).
        beta2: share of v that stays, in [0, 1).
        eps: added to the root of v.
        ok: 0-dim bool. Where it is false nothing changes, whatever the gradients hold.

    Raises:
        ValueError: the lists differ in length, or a tensor has another shape, dtype, layout or device than said here.
        RuntimeError: captured in a CUDA graph without a call before it.
    """
    arguments = (params, grads, exp_avgs, exp_avg_sqs, steps, lrs, weight_decay, beta1, beta2, eps, ok)
    # The dispatcher takes longer over 4 x 401 tensors than all the rest, so it is asked only if someone watches.
    if torch.compiler.is_compiling() or _watched():
        with torch.no_grad():
            torch.ops.kernbench.fused_adamw.default(*arguments)
    else:
        _launch(*arguments)


def _watched() -> bool:
    return is_in_torch_dispatch_mode() or bool(torch.autograd._profiler_enabled())  # type: ignore[attr-defined]


def _launch(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], steps: Tensor,
    lrs: Tensor, weight_decay: float, beta1: float, beta2: float, eps: float, ok: Tensor,
) -> None:  # fmt: skip
    if not len(params) == len(grads) == len(exp_avgs) == len(exp_avg_sqs):
        raise ValueError(
            f"fused_adamw got {len(params)} params, {len(grads)} grads, {len(exp_avgs)} exp_avgs and "
            f"{len(exp_avg_sqs)} exp_avg_sqs; give one of each per parameter"
        )
    if not params:
        return
    check_state = partial(_check_state, params, exp_avgs, exp_avg_sqs)
    group = _pointer_table.group_of((params, exp_avgs, exp_avg_sqs), check_state, _launch_for)
    check_grads = partial(_pointer_table.check_each, "grads", grads, params)
    if not all(map(Tensor.is_contiguous, grads)):
        check_grads()
    table = group.table(grads, check_grads)
    _check_vectors(steps, lrs, ok, len(params), group.device)
    with torch.cuda.device(group.device) if group.device.type == "cuda" else nullcontext():
        _advance_kernel[(triton.cdiv(len(params), ADVANCE_BLOCK),)](
            steps, lrs, ok, table.scratch, len(params), weight_decay, _log2(beta1), _log2(beta2), ADVANCE_BLOCK
        )
        for part in group.parts:
            launch = part.launch
            _update_kernel[(len(part.chunks),)](
                part.chunks, table.rows, table.scratch, ok, 1 - beta1, beta2, 1 - beta2, eps,
                _pointer_table.TENSOR_BITS, TRITON_DTYPES[part.dtype], launch.block, _turn(launch),
                INTERPRETED, num_warps=launch.warps,
            )  # fmt: skip
    torch.autograd.graph.increment_version(params)


def _turn(launch: Launch) -> int:
    """Elements that a block which is not whole handles at a time; in the interpreter two turns are less to wait for."""
    return launch.block // 2 if INTERPRETED else 32 * launch.warps


def _launch_for(elements: int) -> Launch:
    return CACHED if elements <= CACHED_ELEMENTS else STREAMED


def _log2(beta: float) -> float:
    """What 2 is raised to, exact in float64 because it is compiled in; for beta 0 an exponent that underflows."""
    return math.log2(beta) if beta > 0 else -1e5


def _check_state(params: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor]) -> None:
    device = params[0].device
    for index, param in enumerate(params):
        if param.dtype not in TRITON_DTYPES or not param.is_contiguous() or param.device != device:
            raise ValueError(
                "fused_adamw takes contiguous float32, bfloat16 or float16 params, all on one device; "
                f"number {index} is {_pointer_table.described(param)}"
            )
    _pointer_table.check_each("exp_avgs", exp_avgs, params, torch.float32)
    _pointer_table.check_each("exp_avg_sqs", exp_avg_sqs, params, torch.float32)


def _check_vectors(steps: Tensor, lrs: Tensor, ok: Tensor, count: int, device: torch.device) -> None:
    _pointer_table.check("steps", steps, (count,), torch.float32, device)
    _pointer_table.check("lrs", lrs, (count,), torch.float32, device)
    _pointer_table.check("ok", ok, (), torch.bool, device)


_LIBRARY = torch.library.Library("kernbench", "FRAGMENT")  # type: ignore[no-untyped-call]
# torch.library.custom_op adds 1.5 ms of Python to a call with lists of 401; a plain definition adds a sixth of that.
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "fused_adamw(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!) steps, Tensor lrs, float weight_decay, float beta1, float beta2, float eps, Tensor ok) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)
for _key, _implementation in {"CPU": _launch, "CUDA": _launch, "Meta": lambda *_: None}.items():
    _LIBRARY.impl("fused_adamw", _implementation, _key)  # type: ignore[no-untyped-call]


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Parameters with state from the middle of a run: counters from 0 up, two learning rates; to be skipped, or not."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(scale: float, like: torch.dtype) -> list[Tensor]:
        return [(torch.randn(shape, device=device, generator=generator) * scale).to(like) for shape in _shapes(case)]

    state = torch.promote_types(dtype, torch.float32)
    params, grads, exp_avgs = normal(0.05, dtype), normal(1e-2, dtype), normal(3e-3, state)
    exp_avg_sqs = [second.square_() for second in normal(1e-2, state)]
    count = torch.arange(len(params), device=device)
    steps, lrs = (count % 4).to(state), torch.where(count % 3 == 0, 1e-3, 3e-4).to(state)
    for fresh in range(0, len(params), 4):
        exp_avgs[fresh].zero_()
        exp_avg_sqs[fresh].zero_()
    return {
        "params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps, "lrs": lrs,
        "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8,
        "ok": torch.tensor(not case["skip"], device=device),
    }  # fmt: skip


def next_inputs(inputs: Inputs, seed: int) -> None:
    """The gradients of the next update, in place."""
    generator = torch.Generator(inputs["ok"].device).manual_seed(seed)
    for grad in inputs["grads"]:
        grad.normal_(0.0, 1e-2, generator=generator)


def _shapes(case: Case) -> list[tuple[int, ...]]:
    edges = [(), (0,), (1,), (17,), (127, 3)] if case["edges"] else []
    table = [(case["rows"], case["side"])] if case["rows"] else []
    side = case["side"]
    return [*edges, *[(side, side)] * case["squares"], *[(side,)] * case["vectors"], *table]


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """p, g, m, v read and p, m, v written once each, or nothing in a skipped step; counters and table do not count."""
    elements = 0 if case["skip"] else sum(math.prod(shape) for shape in _shapes(case))
    state_bytes = max(dtype.itemsize, 4)
    return Cost(
        flops=15.0 * elements,
        bytes_read=2.0 * (dtype.itemsize + state_bytes) * elements,
        bytes_written=float(dtype.itemsize + 2 * state_bytes) * elements,
    )


SPEC = KernelSpec(
    name="fused_adamw",
    reference=fused_adamw_reference,
    optimized=fused_adamw,
    make_inputs=make_inputs,
    cases=(
        Case("one", edges=0, squares=0, vectors=1, side=1, rows=0, skip=0),
        Case("ragged", edges=1, squares=1, vectors=2, side=61, rows=127, skip=0),
        Case("aligned", edges=0, squares=1, vectors=2, side=64, rows=32, skip=0),
        Case("skipped", edges=0, squares=1, vectors=1, side=33, rows=0, skip=1),
        Case("401-tensors", large=True, edges=0, squares=200, vectors=200, side=512, rows=32000, skip=0),
        Case("159-tensors", large=True, edges=0, squares=59, vectors=100, side=4096, rows=0, skip=0),
    ),
    tolerance={"float32": Tolerance(), "bfloat16": Tolerance(), "float16": Tolerance()},
    cost=cost,
    mutates=("params", "exp_avgs", "exp_avg_sqs", "steps"),
    stateful=True,
    next_inputs=next_inputs,
    sizes={
        "edges": Sizes(most=1),
        "squares": Sizes(most=2),
        "vectors": Sizes(most=3),
        # Squares of 31 to 33 and vectors of 1 to 45 end around a block of 1024 and inside of one.
        "side": Sizes(least=1, most=45, block=math.isqrt(CACHED.block)),
        "rows": Sizes(most=40),
        "skip": Sizes(most=1),
    },
    values={
        "grads": Values(nonfinite=True),
        "exp_avg_sqs": Values(least=0.0),
        "steps": Values(fixed=True),
        "lrs": Values(fixed=True),
    },
    peers=_adamw_peers.PEERS,
    source="Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019, algorithm 2; torch.optim.AdamW",
)

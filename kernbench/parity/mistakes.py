"""What can go wrong in one call of an operator: the mistakes that kernels are known for, one function each.

The kinds follow what public kernels had to fix: terms, masks and constants forgotten, indices turned round or off by
one, offsets that wrap, operands rounded on the way. A mistake is offered where it is possible; whether it makes a
difference is for the caller to find out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernbench.parity import bounds
from kernbench.parity.operators import ATTENTION, Call

SMALL = 1e-2
"""A constant below this is taken for an epsilon: wrong by a factor of ten, or left out."""
OFF = 1.0625
"""What other constants are multiplied by; in bfloat16 that is eight units in the last place."""
TF32_LACKS = 52 - 10
"""Bits of a float64 mantissa that tf32 has not."""
LONGEST_SUM = 4096
"""Numbers that are added one by one to show how a sum in 16 bits ends; each takes a few microseconds."""
ORDINALS = ("first", "second")


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


TERMS = {
    "add": ("self", "other"), "sub": ("self", "other"), "addcmul": ("self", "tensor1"), "addcdiv": ("self", "tensor1"),
    "addmm": ("self", "mat1"), "baddbmm": ("self", "batch1"), "addbmm": ("self", "batch1"), "addmv": ("self", "vec"),
    "addr": ("self", "vec1"),
}  # fmt: skip
FACTORS = {"mul": ("self", "other"), "div": ("self", "other")}
STEPS = _names(
    "sqrt rsqrt exp exp2 expm1 log log2 log1p neg abs reciprocal sigmoid silu gelu tanh erf sin cos square pow round "
    "floor logical_not bitwise_not nan_to_num sgn sign softplus"
)
BOUNDS = _names("clamp clamp_min clamp_max relu hardtanh threshold tril triu")
CHOICES = _names("maximum minimum fmax fmin logical_and logical_or bitwise_and bitwise_or")
STRICTNESS = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt"}
INDEXED = _names(
    "gather index_select take scatter scatter_add index_add index_copy index index_put embedding "
    "embedding_dense_backward"
)
REDUCTIONS = _names(
    "sum mean prod amax amin max min argmax argmin any all var std var_mean std_mean logsumexp linalg_vector_norm norm "
    "nansum aminmax"
)
SOFTMAX = _names("_softmax _log_softmax")
PRODUCTS = {
    "mm": ("self", "mat2"), "bmm": ("self", "mat2"), "mv": ("self", "vec"), "dot": ("self", "tensor"),
    "addmm": ("mat1", "mat2"), "addmv": ("mat", "vec"), "baddbmm": ("batch1", "batch2"), "addbmm": ("batch1", "batch2"),
}  # fmt: skip
OTHER_PRODUCTS = (ATTENTION, "_fused_sdp", "convolution", "_convolution")


@dataclass(frozen=True)
class Mistake:
    """One wrong way to do one call; ``value`` computes its result and leaves the arguments alone."""

    kind: str
    what: str
    value: Callable[[], Any]


def of_call(call: Call) -> Iterator[Mistake]:
    """Every way in which this call can be done wrong."""
    if call.operator.startswith("_foreach_"):
        yield from _one_of_many(call)
        return
    if call.arguments.get("dropout_p"):
        return
    for mistakes in (_terms, _constants, _masks, _indices, _tails, _views, _offsets, _precision):
        yield from mistakes(call)


def _changed(call: Call, kind: str, what: str, /, **arguments: Any) -> Mistake:
    return Mistake(kind, what, lambda: call.again(**arguments))


def _only(call: Call, kind: str, what: str, operand: str) -> Mistake:
    return Mistake(kind, what, lambda: call.like_result(call[operand]))


def _one_of_many(call: Call) -> Iterator[Mistake]:
    tensors = call["self"]
    if tensors:
        what = f"leaves the last tensor out of {call.label}"
        yield Mistake("dropped term", what, lambda: [*call.again()[:-1], tensors[-1].clone()])


def _terms(call: Call) -> Iterator[Mistake]:
    operator, label, kind = call.operator, call.label, "dropped term"
    for name, ordinal in zip(TERMS.get(operator, ()), ORDINALS, strict=False):
        if (term := call.tensor(name)) is not None:
            yield _changed(call, kind, f"drops the {ordinal} term of {label}", **{name: torch.zeros_like(term)})
    for name, ordinal in zip(FACTORS.get(operator, ()), ORDINALS, strict=False):
        if (factor := call.tensor(name)) is not None:
            yield _changed(call, kind, f"leaves out the {ordinal} factor of {label}", **{name: torch.ones_like(factor)})
    if operator == "lerp":
        for name in ("self", "end"):
            yield _only(call, kind, f"takes {name} for lerp", name)
    if operator in STEPS and call.tensor("self") is not None:
        yield _only(call, kind, f"leaves out {label}", "self")
    for argument in call.function._schema.arguments:
        if str(argument.type) == "Optional[Tensor]" and call.tensor(argument.name) is not None:
            yield _changed(call, kind, f"leaves {argument.name} out of {label}", **{argument.name: None})


def _constants(call: Call) -> Iterator[Mistake]:
    label, kind = call.label, "wrong constant"
    for name, value in _scalars(call):
        if name == "correction":
            yield _changed(call, kind, f"divides by the other count in {label}", correction=1 - value)
        elif isinstance(value, int):
            yield _changed(call, kind, f"takes {value + 1} for {value} in {label}", **{name: value + 1})
        elif abs(value) < SMALL or "eps" in name:
            yield _changed(
                call, "wrong epsilon", f"takes {value * 10:g} for {value:g} in {label}", **{name: value * 10}
            )
            yield _changed(call, "wrong epsilon", f"leaves {value:g} out of {label}", **{name: 0.0})
        else:
            yield _changed(call, kind, f"takes {value * OFF:.4g} for {value:.4g} in {label}", **{name: value * OFF})
    other = call.tensor("other")
    if call.operator in ("add", "sub") and other is not None and other.dim() == 0 and other.is_floating_point():
        size = float(other.abs())
        if 0 < size < SMALL:
            yield _changed(call, "wrong epsilon", f"adds ten times the small number in {label}", other=other * 10)


def _scalars(call: Call) -> Iterator[tuple[str, int | float]]:
    """Numbers among the arguments that are no sizes and no axes; Python's numbers come in the place of tensors too."""
    if call.operator in ("arange", "linspace"):
        return
    for argument in call.function._schema.arguments:
        name, value = argument.name, call.arguments.get(argument.name)
        if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) == float("inf"):
            continue
        of_numbers = any(word in str(argument.type) for word in ("number", "float", "Tensor"))
        if of_numbers and (value != 0 or name == "correction"):
            yield name, value


def _masks(call: Call) -> Iterator[Mistake]:
    operator, label, kind = call.operator, call.label, "missing mask"
    if operator == "where" and "self" in call.arguments:
        for condition, ordinal in zip((torch.ones_like, torch.zeros_like), ORDINALS, strict=True):
            what = f"always takes the {ordinal} of where"
            yield _changed(call, kind, what, condition=condition(call["condition"]))
    if operator == "masked_fill":
        yield _changed(call, kind, "fills nothing in masked_fill", mask=torch.zeros_like(call["mask"]))
    if operator in BOUNDS:
        yield _only(call, kind, f"leaves out {label}", "self")
    if operator in ("tril", "triu"):
        diagonal = call.arguments.get("diagonal", 0) + 1
        yield _changed(call, "off by one", f"takes the next diagonal in {label}", diagonal=diagonal)
    if operator in CHOICES and call.tensor("other") is not None:
        for name, ordinal in zip(("self", "other"), ORDINALS, strict=True):
            yield _only(call, kind, f"always takes the {ordinal} of {label}", name)
    if operator in STRICTNESS and not call.function._schema.is_mutable:
        swapped = getattr(getattr(torch.ops.aten, STRICTNESS[operator]), call.function._overloadname)
        what = f"takes {STRICTNESS[operator]} for {label}"
        yield Mistake("off by one", what, lambda: swapped(call["self"], call["other"]))


def _indices(call: Call) -> Iterator[Mistake]:
    operator, label, kind = call.operator, call.label, "transposed index"
    if operator in ("t", "transpose", "permute"):
        tensor = call["self"]
        if tensor.dim() >= 2 and call.again().shape == tensor.shape:
            yield Mistake(kind, f"leaves out {label}", lambda: torch.ops.aten.alias.default(tensor))
    for name in PRODUCTS.get(operator, ()):
        factor = call[name]
        if factor.dim() >= 2 and factor.shape[-1] == factor.shape[-2] > 1:
            yield _changed(call, kind, f"takes rows for columns of {name} in {label}", **{name: factor.mT})
    if operator in INDEXED:
        for index, rows, place in bounds.indexed(call):
            for what, wrong in _wrong_indices(index, rows):
                yield _changed(call, kind, f"{what} in {label}", **_with_indices(call, wrong, place))
    if operator in ("cat", "stack") and len({tensor.shape for tensor in call["tensors"]}) == 1:
        turned = list(reversed(call["tensors"]))
        yield _changed(call, kind, f"turns the order of {label} round", tensors=turned)
    if operator == "flip":
        yield _only(call, kind, "leaves out flip", "self")


def _with_indices(call: Call, wrong: Tensor, place: int) -> dict[str, Any]:
    """The argument that holds a call's indices, with these at their place."""
    if call.operator in bounds.INDEXED:
        return {bounds.INDEXED[call.operator]: wrong}
    return {"indices": [*call["indices"][:place], wrong, *call["indices"][place + 1 :]]}


def _wrong_indices(index: Tensor, rows: int) -> Iterator[tuple[str, Tensor]]:
    if rows > 1 and index.numel():
        yield "takes the next row", (index + 1) % rows
    if index.dim() and index.shape[0] > 1:
        yield "takes the indices in reverse", index.flip(0)


def _tails(call: Call) -> Iterator[Mistake]:
    operator, tensor = call.operator, call.tensor("self")
    kind, last = "off by one", f"leaves the last element out of {call.label}"
    if operator in REDUCTIONS and tensor is not None and call.tensor("other") is None:
        axis = _last_axis(call, tensor)
        if axis is not None:
            size = tensor.shape[axis]
            shorter, share = tensor.narrow(axis, 0, size - 1), (size - 1) / size if operator == "mean" else None
            yield Mistake(kind, last, lambda: _times(call.again(self=shorter), share))
    if operator in SOFTMAX and tensor is not None and tensor.shape[call["dim"]] > 1:
        masked = tensor.clone()
        masked.select(call["dim"], -1).fill_(float("-inf"))
        yield _changed(call, kind, last, self=masked)
    if operator in ("cumsum", "cumprod") and tensor is not None and tensor.dim():
        yield Mistake(kind, f"shifts {call.label} by one", lambda: call.again().roll(1, call["dim"]))
    if operator in PRODUCTS:
        left, right = (call[name] for name in PRODUCTS[operator])
        inner = left.shape[-1] - 1
        if inner > 0:
            across = right.narrow(-1 if right.dim() == 1 else -2, 0, inner)
            names = PRODUCTS[operator]
            yield _changed(call, kind, last, **dict(zip(names, (left.narrow(-1, 0, inner), across), strict=True)))
    if operator.startswith(ATTENTION) and call.tensor("key") is not None and call["key"].shape[-2] > 1:
        keys = call["key"].shape[-2] - 1
        yield _changed(call, kind, last, key=call["key"].narrow(-2, 0, keys), value=call["value"].narrow(-2, 0, keys))
    if operator == "arange":
        yield Mistake(kind, "counts from one in arange", lambda: call.again() + 1)


def _times(value: Any, share: float | None) -> Any:
    return value if share is None else value * share


def _views(call: Call) -> Iterator[Mistake]:
    tensor, kind = call.tensor("self"), "off by one"
    if tensor is None or not tensor.dim():
        return
    if call.operator == "slice":
        size = tensor.shape[call.arguments.get("dim", 0)]
        bounds = (call.arguments.get("start"), call.arguments.get("end"))
        start, end = (0 if bounds[0] is None else bounds[0], size if bounds[1] is None else min(bounds[1], size))
        start, end = (bound + size if bound < 0 else bound for bound in (start, end))
        shift = -1 if start > 0 else 1
        if start > 0 or end < size:
            yield _changed(call, kind, "starts one place off in slice", start=start + shift, end=end + shift)
    if call.operator == "select" and tensor.shape[call["dim"]] > 1:
        index = (call["index"] + 1) % tensor.shape[call["dim"]]
        yield _changed(call, kind, "takes the next place in select", index=index)
    if call.operator == "roll":
        yield _changed(call, kind, "rolls one place more", shifts=[shift + 1 for shift in call["shifts"]])


def _last_axis(call: Call, tensor: Tensor) -> int | None:
    """The last axis of more than one element that a reduction goes over."""
    given = call.arguments.get("dim")
    axes = range(tensor.dim()) if given is None or given == [] else [given] if isinstance(given, int) else given
    return max((axis % tensor.dim() for axis in axes if tensor.dim() and tensor.shape[axis] > 1), default=None)


def _offsets(call: Call) -> Iterator[Mistake]:
    """What lies past half of the largest operand is read from its beginning, as when a 32-bit offset has wrapped."""
    # A cast is no call in the oracle, and what a copy overwrites is not read.
    unread = {"copy": "self", "_to_copy": "self"}.get(call.operator)
    tensors = {name: value for name, value in call.arguments.items() if isinstance(value, Tensor) and name != unread}
    name = max(tensors, key=lambda key: tensors[key].numel(), default="")
    if call.function.is_view or not name or not tensors[name].is_floating_point() or tensors[name].numel() < 4:
        return

    def wrapped() -> Any:
        flat = tensors[name].reshape(-1)
        half = (len(flat) + 1) // 2
        return call.again(**{name: torch.cat([flat[:half], flat[: len(flat) - half]]).reshape(tensors[name].shape)})

    yield Mistake("int32 offset", f"wraps round in {name} of {call.label}", wrapped)


def _precision(call: Call) -> Iterator[Mistake]:
    operator, label, kind = call.operator, call.label, "accumulation"
    wide = {
        name: value
        for name, value in call.arguments.items()
        if isinstance(value, Tensor) and value.dtype in (torch.float32, torch.float64)
    }
    factors = PRODUCTS.get(operator, tuple(wide) if operator.startswith(OTHER_PRODUCTS) else ())
    if wide and factors:
        rounded = {name: tf32(wide[name]) for name in factors if name in wide}
        yield _changed(call, "tf32", f"rounds the operands of {label} to tf32", **rounded)
    if not (factors or operator in REDUCTIONS | SOFTMAX or operator == "cumsum" or "norm" in operator):
        return
    if operator in ("sum", "mean"):
        yield from _one_by_one(call, call["self"])
    elif wide:
        dtype = next(iter(wide.values())).dtype
        narrow = {name: value.bfloat16() for name, value in wide.items()}
        yield Mistake(kind, f"computes {label} in bfloat16", lambda: _cast(call.again(**narrow), dtype))


def tf32(tensor: Tensor) -> Tensor:
    """The nearest numbers with ten bits of mantissa; infinities and NaN as they are."""
    bits = tensor.double().view(torch.int64)
    half = 1 << (TF32_LACKS - 1)
    rounded = ((bits + half) >> TF32_LACKS << TF32_LACKS).view(torch.float64)
    return torch.where(tensor.isfinite(), rounded, tensor.double()).to(tensor.dtype)


def _one_by_one(call: Call, tensor: Tensor) -> Iterator[Mistake]:
    """The sum as one thread has it that keeps it in 16 bits, in which nothing changes once it is large."""
    axis = _last_axis(call, tensor)
    if axis is None or not tensor.is_floating_point() or tensor.shape[axis] > LONGEST_SUM:
        return

    def added(narrow: torch.dtype) -> Any:
        total = torch.zeros_like(tensor.select(axis, 0), dtype=narrow)
        for part in tensor.unbind(axis):
            total = (total + part).to(narrow)
        count = tensor.shape[axis] if call.operator == "mean" else 1
        return call.again(self=(total.to(tensor.dtype) / count).unsqueeze(axis))

    for narrow in (torch.bfloat16, torch.float16):
        if tensor.dtype in (narrow, torch.float32, torch.float64):
            name = str(narrow).removeprefix("torch.")
            yield Mistake("accumulation", f"adds one by one in {name} in {call.label}", partial(added, narrow))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return type(value)(_cast(item, dtype) for item in value) if isinstance(value, list | tuple) else value

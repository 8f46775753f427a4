"""The work that an operator's recorded shapes imply: flops, and bytes, each input read and each output written once.

Kineto records the dimensions and types of inputs only, and no sizes given as plain numbers (strides, reduced
dimensions). What an output's shape depends on such a number for is left out, and what it is worked out from stands in
the operator's function below. Flops are counted as usual: a multiply-add is two, any elementwise function one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from kernbench.analysis import opnames

_DTYPES = {
    "double": ("float64", 8),
    "float": ("float32", 4),
    "c10::Half": ("float16", 2),
    "c10::BFloat16": ("bfloat16", 2),
    "c10::Float8_e4m3fn": ("float8_e4m3fn", 1),
    "c10::Float8_e5m2": ("float8_e5m2", 1),
    "c10::Float8_e4m3fnuz": ("float8_e4m3fnuz", 1),
    "c10::Float8_e5m2fnuz": ("float8_e5m2fnuz", 1),
    "c10::complex<double>": ("complex128", 16),
    "c10::complex<float>": ("complex64", 8),
    "long int": ("int64", 8),
    "long": ("int64", 8),
    "int": ("int32", 4),
    "short int": ("int16", 2),
    "short": ("int16", 2),
    "signed char": ("int8", 1),
    "unsigned char": ("uint8", 1),
    "bool": ("bool", 1),
}
# Rising: what an operation on two types results in is the later one, but for the two halves, which give float32.
_PROMOTION = (
    *("bool", "uint8", "int8", "int16", "int32", "int64"),
    *("float8_e5m2fnuz", "float8_e4m3fnuz", "float8_e5m2", "float8_e4m3fn"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
)
_SIZES = dict(_DTYPES.values())
# Flops per element where a row is reduced and written again: softmax takes the maximum, subtracts, exponentiates, sums
# and divides; a norm takes mean, variance (2), subtracts, scales, and applies weight and bias.
_SOFTMAX_FLOPS, _SOFTMAX_BACKWARD_FLOPS = 5, 4
_NORM_FLOPS, _NORM_BACKWARD_FLOPS = 7, 12
# The backward of fused attention multiplies five times (the scores once more), the forward twice.
_ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class Tensor:
    dims: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return self.elements * _SIZES[self.dtype]


Inputs = Sequence[Tensor | None]
"""An operator's inputs by position; None for what is no single tensor."""


@dataclass(frozen=True)
class Work:
    """``output`` is the tensor that the next operator would read, None where its shape is not known."""

    flops: float
    bytes_read: float
    bytes_written: float
    dtype: str
    output: Tensor | None = None
    note: str = ""

    @property
    def bytes(self) -> float:
        return self.bytes_read + self.bytes_written


def inputs(shape: tuple[str, str]) -> list[Tensor | None]:
    """The inputs from the recorded dimensions and types (JSON text); what is no tensor, or of unknown type, is None."""
    try:
        dims, types = (msgspec.json.decode(text) for text in shape)
    except msgspec.DecodeError:
        return []
    if not isinstance(dims, list) or not isinstance(types, list) or len(dims) != len(types):
        return []
    return [_tensor(size, kind) for size, kind in zip(dims, types, strict=True)]


def _tensor(dims: object, kind: object) -> Tensor | None:
    if not isinstance(kind, str) or kind not in _DTYPES or not isinstance(dims, list):
        return None
    if not all(isinstance(size, int) and size >= 0 for size in dims):
        return None
    return Tensor(tuple(dims), _DTYPES[kind][0])


def known(name: str) -> bool:
    """Whether the work of an operator of that name can be told from its shapes."""
    return name in _FUNCTIONS


def work(name: str, given: Inputs, output: Tensor | None = None) -> Work | None:
    """The work of one call; None where the operator or these shapes are not understood.

    Args:
        output: the result's shape where the inputs do not tell it (a convolution's).
    """
    function = _FUNCTIONS.get(name)
    if function is None:
        return None
    if name in opnames.CONVOLUTION:
        return _convolution(given, output)
    return function(name, given)


def promoted(tensors: Sequence[Tensor]) -> str:
    """The type that an elementwise operation gives; a tensor without dimensions counts only if all are."""
    dtypes = {one.dtype for one in tensors if one.dims} or {one.dtype for one in tensors}
    if {"float16", "bfloat16"} <= dtypes:
        dtypes.add("float32")
    return max(dtypes, key=_PROMOTION.index)


def _present(given: Inputs) -> list[Tensor]:
    return [one for one in given if one is not None]


def _read(tensors: Sequence[Tensor]) -> int:
    return sum(one.bytes for one in tensors)


def _broadcast(tensors: Sequence[Tensor]) -> tuple[int, ...] | None:
    """The common shape of tensors; None where they do not fit."""
    rank = max(len(one.dims) for one in tensors)
    sizes = []
    for position in range(-rank, 0):
        found = {one.dims[position] for one in tensors if len(one.dims) >= -position} - {1}
        if len(found) > 1:
            return None
        sizes.append(found.pop() if found else 1)
    return tuple(sizes)


def _pointwise(name: str, given: Inputs) -> Work | None:
    tensors = _present(given)
    if not tensors or given[0] is None:
        return None
    dims = _broadcast(tensors)
    if dims is None:
        return None
    in_place = name.endswith("_")
    output = tensors[0] if in_place else Tensor(dims, promoted(tensors))
    if name in opnames.COMPARISON and not in_place:
        output = Tensor(dims, "bool")
    if name in opnames.SELECTION and len(tensors) > 1:
        # The condition is read, but does not say what type comes out.
        output = Tensor(dims, promoted([one for one in tensors if one.dtype != "bool"] or tensors))
    return Work(output.elements, _read(tensors), output.bytes, promoted(tensors), output)


def _copy(_name: str, given: Inputs) -> Work | None:
    tensors = _present(given)
    if len(tensors) < 2:
        return None
    target, origin = tensors[:2]
    return Work(0, origin.bytes, target.bytes, target.dtype, target)


def _duplicate(_name: str, given: Inputs) -> Work | None:
    tensors = _present(given)
    return Work(0, tensors[0].bytes, tensors[0].bytes, tensors[0].dtype, tensors[0]) if tensors else None


def _fill(_name: str, given: Inputs) -> Work | None:
    tensors = _present(given)
    return Work(0, 0, tensors[0].bytes, tensors[0].dtype, tensors[0]) if tensors else None


def _reduction(_name: str, given: Inputs) -> Work | None:
    tensors = _present(given)
    if not tensors:
        return None
    return Work(
        tensors[0].elements,
        tensors[0].bytes,
        0,
        tensors[0].dtype,
        note="the result is not counted: which dimensions are reduced is not recorded",
    )


def _product(name: str, given: Inputs) -> Work | None:
    """mm, bmm, mv, dot; with "add" in the name the first input is added to the product."""
    added = name in opnames.ADDED_PRODUCT
    tensors = given[: 2 + added]
    if len(tensors) < 2 + added or None in tensors:
        return None
    *bias, left, right = _present(tensors)
    rank = (len(left.dims), len(right.dims))
    if rank not in opnames.PRODUCT_RANKS or left.dims[-1] != right.dims[-2 if rank[1] > 1 else -1]:
        return None
    if rank == (3, 3) and left.dims[0] != right.dims[0]:
        return None
    columns = right.dims[-1:] if rank[1] > 1 else ()
    output = Tensor((*left.dims[:-1], *columns), promoted([left, right]))
    read = _read([*bias, left, right])
    return Work(2.0 * output.elements * left.dims[-1], read, output.bytes, output.dtype, output)


def _linear(_name: str, given: Inputs) -> Work | None:
    tensors = _present(given[:3])
    if len(tensors) < 2 or len(tensors[1].dims) != 2 or not tensors[0].dims:
        return None
    left, weight = tensors[:2]
    if left.dims[-1] != weight.dims[1]:
        return None
    output = Tensor((*left.dims[:-1], weight.dims[0]), promoted([left, weight]))
    return Work(2.0 * output.elements * left.dims[-1], _read(tensors), output.bytes, output.dtype, output)


def _convolution(given: Inputs, output: Tensor | None) -> Work | None:
    tensors = _present(given[:4])
    if output is None or len(tensors) < 2 or not fits_convolution(given, output):
        return None
    flops = 2.0 * output.elements / output.dims[1] * tensors[1].elements
    return Work(flops, _read(tensors), output.bytes, output.dtype, output)


def fits_convolution(given: Inputs, output: Tensor) -> bool:
    """Whether a convolution of these inputs can give ``output``, by batch, channels, and a size within the padding."""
    tensors = _present(given[:2])
    if len(tensors) < 2 or not len(tensors[0].dims) == len(tensors[1].dims) == len(output.dims) >= 3:
        return False
    image, weight = tensors
    sizes = zip(image.dims[2:], weight.dims[2:], output.dims[2:], strict=True)
    channels = (output.dims[0], output.dims[1]) == (image.dims[0], weight.dims[0]) and output.dims[1] > 0
    return channels and output.dtype == image.dtype and all(out < size + kernel for size, kernel, out in sizes)


def _convolution_backward(_name: str, given: Inputs) -> Work | None:
    """Gradients of input and weight, a convolution's flops each; which of the two is wanted is not recorded."""
    tensors = _present(given[:3])
    if len(tensors) < 3 or not fits_convolution(tensors[1:], tensors[0]):
        return None
    gradient, image, weight = tensors
    flops = 4.0 * gradient.elements / gradient.dims[1] * weight.elements
    return Work(
        flops,
        _read(tensors),
        image.bytes + weight.bytes,
        image.dtype,
        image,
        note="counted with both gradients, of the input and of the weight",
    )


def _attention(name: str, given: Inputs) -> Work | None:
    return _attended(name, given[:3], None)


def _attention_backward(name: str, given: Inputs) -> Work | None:
    return _attended(name, given[1:4], given[0] if given else None)


def _attended(name: str, given: Inputs, gradient: Tensor | None) -> Work | None:
    tensors = _present(given)
    if len(tensors) != 3 or any(len(one.dims) != 4 for one in tensors):
        return None
    query, key, value = tensors
    # The kernels' own operators have the heads behind the sequence.
    heads, rows = (2, 1) if name in opnames.SEQUENCE_FIRST else (1, 2)
    length, width = key.dims[rows], value.dims[3]
    flops = 2.0 * query.dims[0] * query.dims[heads] * query.dims[rows] * length * (query.dims[3] + width)
    output = Tensor((*query.dims[:3], width), query.dtype)
    note = "counted without a mask; a causal one leaves about half of the flops"
    if gradient is None:
        return Work(flops, _read(tensors), output.bytes, query.dtype, output, note)
    read = _read([*tensors, gradient, output])
    return Work(_ATTENTION_BACKWARD * flops, read, _read(tensors), query.dtype, query, note)


def _softmax(name: str, given: Inputs) -> Work | None:
    tensors = _present(given[:2]) if "backward" in name else _present(given[:1])
    if not tensors:
        return None
    output = tensors[0]
    each = _SOFTMAX_BACKWARD_FLOPS if "backward" in name else _SOFTMAX_FLOPS
    return Work(each * output.elements, _read(tensors), output.bytes, output.dtype, output)


def _norm(_name: str, given: Inputs) -> Work | None:
    tensors = _present(given)
    if not tensors or given[0] is None:
        return None
    output = tensors[0]
    return Work(_NORM_FLOPS * output.elements, _read(tensors), output.bytes, output.dtype, output)


def _norm_backward(_name: str, given: Inputs) -> Work | None:
    """Reads the gradient, the input, statistics and weight; writes the gradients of the input and of the weights."""
    tensors = _present(given)
    if len(tensors) < 2 or given[0] is None:
        return None
    output = tensors[1]
    weights = [one for one in tensors[2:] if one.dims and one.elements == output.dims[-1]]
    written = output.bytes + _read(weights)
    return Work(_NORM_BACKWARD_FLOPS * output.elements, _read(tensors), written, output.dtype, output)


def _embedding(_name: str, given: Inputs) -> Work | None:
    tensors = _present(given[:2])
    if len(tensors) < 2 or len(tensors[0].dims) != 2:
        return None
    table, index = tensors
    output = Tensor((*index.dims, table.dims[1]), table.dtype)
    return Work(0, index.bytes + min(table.bytes, output.bytes), output.bytes, table.dtype, output)


_FUNCTIONS: dict[str, Callable[[str, Inputs], Work | None]] = {
    **dict.fromkeys(opnames.POINTWISE, _pointwise),
    **dict.fromkeys(opnames.FILL, _fill),
    **dict.fromkeys(opnames.REDUCTION, _reduction),
    **dict.fromkeys(opnames.PRODUCT | opnames.ADDED_PRODUCT, _product),
    **dict.fromkeys(opnames.CONVOLUTION, lambda _name, given: _convolution(given, None)),
    **dict.fromkeys(opnames.ATTENTION, _attention),
    **dict.fromkeys(opnames.ATTENTION_BACKWARD, _attention_backward),
    **dict.fromkeys(opnames.SOFTMAX, _softmax),
    **dict.fromkeys(opnames.NORM, _norm),
    **dict.fromkeys(opnames.NORM_BACKWARD, _norm_backward),
    "aten::copy_": _copy,
    "aten::clone": _duplicate,
    "aten::linear": _linear,
    "aten::convolution_backward": _convolution_backward,
    "aten::embedding": _embedding,
}

"""Which operators make the host wait for the device on a GPU, and how the source asks for each.

Source: the CUDA implementations in ATen, where each of these copies a value to the host and synchronises the stream;
``aten::index_put_`` with a mask and a host scalar becomes ``masked_fill`` there and does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum, auto
from typing import Any, NamedTuple

import torch

from kernbench.watching.taint import Sides


class Body(Enum):
    """What an operator is made of: whether the watch has to look inside.

    Composite operators are made of others, and arrive whole under ``torch.inference_mode`` and in custom operators.
    Custom operators are Python functions behind a dispatch key.
    """

    LEAF = auto()
    COMPOSITE = auto()
    CUSTOM = auto()


def body(operator: Any) -> Body:
    """What an overload is made of."""
    if operator._can_decompose():
        return Body.COMPOSITE
    return Body.LEAF if operator.namespace in ("aten", "prims", "profiler") else Body.CUSTOM


class Read(NamedTuple):
    """One read that a call makes; ``form`` where it is not the operator's usual one."""

    host_tensor: bool
    form: str = ""


Rule = Callable[[tuple[Any, ...], Mapping[str, Any], Sides], list[Read]]
_WAIT = Read(host_tensor=False)
_COPY = Read(host_tensor=False, form="copy")

# By the outermost torch function: (operator as Kineto shows it, form) of the scalar read inside it.
SCALAR_FORMS = {
    "__bool__": ("aten::is_nonzero", "if"),
    "is_nonzero": ("aten::is_nonzero", "if"),
    "__float__": ("aten::item", "float"),
    "__int__": ("aten::item", "int"),
    "__complex__": ("aten::item", "complex"),
    "__index__": ("aten::item", "index"),
    "__getitem__": ("aten::item", "index"),
    "__contains__": ("aten::item", "in"),
}

FORMS = {
    "aten::nonzero": "nonzero",
    "aten::index": "mask",
    "aten::_unsafe_index": "mask",
    "aten::index_put_": "mask",
    "aten::index_put": "mask",
    "aten::masked_select": "masked_select",
    "aten::_unique": "unique",
    "aten::_unique2": "unique",
    "aten::unique_dim": "unique",
    "aten::unique_consecutive": "unique",
    "aten::unique_dim_consecutive": "unique",
    "aten::repeat_interleave": "repeat_interleave",
    "aten::bincount": "bincount",
    "aten::equal": "equal",
    "aten::allclose": "allclose",
    "aten::copy_": "copy",
    "aten::_to_copy": "copy",
    "aten::fill_": "item",
    "aten::_linalg_check_errors": "linalg",
    "aten::_linalg_eigh": "linalg",
    "aten::_linalg_svd": "linalg",
    "aten::linalg_eig": "linalg",
}


def describe(operator: str, function: str) -> tuple[str, str]:
    """(operator, form) of a read: ``operator`` is what was dispatched, ``function`` the torch function around it."""
    if operator == "aten::_local_scalar_dense":
        return SCALAR_FORMS.get(function, ("aten::item", "item"))
    if operator == "aten::nonzero" and function in ("where", "argwhere"):
        return f"aten::{function}", function
    if operator == "aten::_linalg_check_errors" and function.startswith("linalg_"):
        return f"aten::{function}", "linalg"
    return operator, FORMS[operator]


def _scalar(args: tuple[Any, ...], kwargs: Mapping[str, Any], sides: Sides) -> list[Read]:
    return [Read(host_tensor=not sides.holds(args[0]))]


def _sizes_result(args: tuple[Any, ...], kwargs: Mapping[str, Any], sides: Sides) -> list[Read]:
    """The result's size depends on values: a wait on the device, plain computing on the host."""
    return [_WAIT] if sides.holds(args[0]) else []


def _repeats(args: tuple[Any, ...], kwargs: Mapping[str, Any], sides: Sides) -> list[Read]:
    return [] if kwargs.get("output_size") is not None else _sizes_result(args, kwargs, sides)


def _compares(args: tuple[Any, ...], kwargs: Mapping[str, Any], sides: Sides) -> list[Read]:
    first, second = args[:2]
    if first.shape != second.shape:
        return []
    return [Read(host_tensor=not (sides.holds(first) or sides.holds(second)))]


def _indexes(args: tuple[Any, ...], kwargs: Mapping[str, Any], sides: Sides) -> list[Read]:
    """A mask on the device is counted first; an index on the host is copied over, a host mask once per dimension."""
    if not sides.holds(args[0]):
        return []
    reads: list[Read] = []
    for index in args[1]:
        if index is None:
            continue
        mask = index.dtype in (torch.bool, torch.uint8)
        if sides.holds(index):
            reads += [_WAIT] * mask
        else:
            reads += [_COPY] * (index.dim() if mask else 1)
    return reads


def _index_puts(args: tuple[Any, ...], kwargs: Mapping[str, Any], sides: Sides) -> list[Read]:
    target, indices, value = args[:3]
    given = [index for index in indices if index is not None]
    one_mask = len(given) == 1 and given[0].dtype in (torch.bool, torch.uint8) and sides.holds(given[0])
    if one_mask and value.numel() == 1 and not sides.holds(value):
        return []
    return _indexes(args, kwargs, sides)


def _copies(args: tuple[Any, ...], kwargs: Mapping[str, Any], sides: Sides) -> list[Read]:
    non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
    return [_COPY] if sides.holds(args[0]) != sides.holds(args[1]) and not non_blocking else []


def _moves(args: tuple[Any, ...], kwargs: Mapping[str, Any], sides: Sides) -> list[Read]:
    target = sides.names(kwargs.get("device"))
    if target is None or target == sides.holds(args[0]) or kwargs.get("non_blocking"):
        return []
    return [_COPY]


def _fills(args: tuple[Any, ...], kwargs: Mapping[str, Any], sides: Sides) -> list[Read]:
    value = args[1]
    return [_WAIT] if isinstance(value, torch.Tensor) and sides.holds(value) and not sides.holds(args[0]) else []


RULES: dict[str, Rule] = {
    **dict.fromkeys(FORMS, _sizes_result),
    "aten::_local_scalar_dense": _scalar,
    "aten::repeat_interleave": _repeats,
    "aten::equal": _compares,
    "aten::allclose": _compares,
    "aten::index": _indexes,
    "aten::_unsafe_index": _indexes,
    "aten::index_put_": _index_puts,
    "aten::index_put": _index_puts,
    "aten::copy_": _copies,
    "aten::_to_copy": _moves,
    "aten::fill_": _fills,
}

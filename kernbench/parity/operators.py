"""One call of an operator of torch, so that it can be repeated with other arguments and without side effects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

ATTENTION = "_scaled_dot_product"
"""Draws random numbers only for dropout."""


@dataclass(frozen=True)
class Call:
    """One call of an operator, its arguments by the names that its schema gives them."""

    function: OpOverload
    arguments: Mapping[str, Any]

    @classmethod
    def of(cls, function: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        names = (argument.name for argument in function._schema.arguments)
        return cls(function, dict(zip(names, args, strict=False)) | dict(kwargs))

    @property
    def operator(self) -> str:
        """The name that variants in place and out of place share."""
        return operator_of(self.function)

    @property
    def label(self) -> str:
        """The operator as a reader knows it."""
        return self.operator.lstrip("_").removeprefix("native_")

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def tensor(self, name: str) -> Tensor | None:
        """The argument of this name if it is given and is a tensor."""
        value = self.arguments.get(name)
        return value if isinstance(value, Tensor) else None

    def again(self, /, **changed: Any) -> Any:
        """The result with some arguments changed; an operator in place writes into a copy."""
        arguments = dict(self.arguments) | changed
        if in_place(self.function):
            arguments["self"] = _copy(arguments["self"])
        positional = []
        for argument in self.function._schema.arguments:
            if argument.kwarg_only or argument.name not in arguments:
                break
            positional.append(arguments.pop(argument.name))
        result = self.function(*positional, **arguments)
        return positional[0] if result is None else result

    def like_result(self, value: Tensor) -> Tensor:
        """An operand in the shape and dtype of the result."""
        result = self.again()
        return value.to(result.dtype).expand(result.shape).clone()

    def write(self, value: Any) -> Any:
        """What the call returns if its result is ``value``; an operator in place leaves it in its first operand."""
        if not in_place(self.function):
            return value
        if isinstance(value, list):
            for target, item in zip(self["self"], value, strict=True):
                target.copy_(item)
            return None
        return self["self"].copy_(value)


def operator_of(function: OpOverload) -> str:
    """The name that variants in place and out of place share."""
    return function._schema.name.split("::")[-1].rstrip("_")


def in_place(function: OpOverload) -> bool:
    """Whether it writes into its first operand."""
    arguments = function._schema.arguments
    return bool(arguments) and arguments[0].name == "self" and _written(arguments[0])


def alterable(function: OpOverload) -> bool:
    """Whether calls of it can be repeated: it draws no random numbers and writes nowhere but into its first operand."""
    if torch.Tag.nondeterministic_seeded in function.tags and not operator_of(function).startswith(ATTENTION):
        return False
    return sum(map(_written, function._schema.arguments)) == int(in_place(function))


def _written(argument: Any) -> bool:
    return argument.alias_info is not None and bool(argument.alias_info.is_write)


def _copy(value: Any) -> Any:
    return [item.clone() for item in value] if isinstance(value, list | tuple) else value.clone()

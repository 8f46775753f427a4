"""Makes Triton's interpreter quicker, without a change to what it computes.

Its language is patched once for a launch, not again for every call of a device function, which ``tl.sum``, ``tl.zeros``
and every ``@triton.jit`` helper are, and the next launch puts the same functions in place without a search for them.
What the interpreter makes anew for every operation is remembered: NumPy's dtype for one of Triton's, and block types by
their shape. And what it computes to throw it away is left out: whether an integer operation overflows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from operator import is_
from typing import Any

BLOCK_TYPE = {"element_ty", "shape", "numel", "name"}
TENSOR = {"handle", "shape", "numel", "type", "dtype"}


def quicken() -> None:
    """Do so for this process, where there is Triton and its interpreter has what is to be replaced."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    language = interpreter.tl
    scope = getattr(interpreter, "_LangPatchScope", None)
    if scope is not None and hasattr(scope, "set_attr"):
        _replace(interpreter, "_patch_lang", lambda patch: _unless_patched(patch, scope, language))
    _replace(interpreter, "_get_np_dtype", lambda dtype_of: _remembered(dtype_of, language.dtype))
    semantic = getattr(interpreter, "TritonSemantic", None)
    _replace(semantic, "binary_op_sanitize_overflow_impl", _overflow_for_debuggers(interpreter.InterpreterBuilder))
    _replace(semantic, "broadcast_impl_value", _broadcast_unless_equal)
    _quicken_types(language.core)


def _replace(owner: Any, name: str, quicker: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put what ``quicker`` makes of a function in its place, once; the original is its ``__wrapped__``."""
    original = getattr(owner, name, None)
    if original is not None and not hasattr(original, "__wrapped__"):
        setattr(owner, name, functools.wraps(original)(quicker(original)))


def _unless_patched(patch: Callable[[Any], Any], scope: Callable[[], Any], language: Any) -> Callable[[Any], Any]:
    """``patch``, but for a function whose language is patched already: by the launch that it is called in."""
    core = language.core
    again = _again(patch, scope, language)

    def patched(module: Any) -> bool:
        # Tensors and descriptors belong to all modules, and are restored after a launch where a module may be left.
        members = module.load, module.tensor.__add__, core.tensor_descriptor_base.load
        return not any(core.is_builtin(member) for member in members)

    def patch_unless_patched(function: Any) -> Any:
        modules = [found for found in function.__globals__.values() if found is language or found is core]
        return scope() if modules and all(map(patched, modules)) else again(function, modules)

    return patch_unless_patched


def _again(patch: Callable[[Any], Any], scope: Callable[[], Any], language: Any) -> Callable[[Any, list[Any]], Any]:
    """``patch``, which repeats what it did before where it finds all that it looks at as it was then."""
    core = language.core
    looked_at: list[Any] = [language, core, language.math, *core.tensor_descriptor_base.__mro__[:-1]]
    looked_at += [*core.tensor.__mro__[:-1], core.dtype, getattr(core, "condition", core.dtype)]
    done: dict[Hashable, tuple[list[Any], list[tuple[Any, str, Any]]]] = {}

    def state() -> list[Any]:
        return [one for owner in looked_at for one in (*vars(owner), *vars(owner).values())]

    def patch_again(function: Any, modules: list[Any]) -> Any:
        key = tuple(map(id, modules))
        before, (was, changes) = state(), done.get(key, ([], []))
        if len(before) == len(was) and all(map(is_, before, was)):
            repeated = scope()
            for owner, name, value in changes:
                repeated.set_attr(owner, name, value)
            return repeated
        patched = patch(function)
        places = {(id(owner), name): (owner, name) for owner, name, _ in patched._changes}
        if all(any(owner is known for known in looked_at) for owner, _ in places.values()):
            # A value is read where it was set: of a class, from itself and not from what its descriptor gives.
            done[key] = before, [(owner, name, vars(owner)[name]) for owner, name in places.values()]
        return patched

    return patch_again


def _remembered(dtype_of: Callable[[Any], Any], scalar: type) -> Callable[[Any], Any]:
    """``dtype_of`` that remembers what it said of scalar types; others cannot be keys."""
    remembered = functools.cache(dtype_of)

    def dtype_of_scalar_or_other(kind: Any) -> Any:
        return remembered(kind) if type(kind) is scalar else dtype_of(kind)

    return dtype_of_scalar_or_other


def _overflow_for_debuggers(builder: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Each integer operation is computed again in 64 bits, for an assertion that is dropped unless one debugs."""

    def quicker(check: Callable[..., Any]) -> Callable[..., Any]:
        def check_if_debugging(self: Any, *operands: Any) -> None:
            if self.builder.options.debug or not isinstance(self.builder, builder):
                check(self, *operands)

        return check_if_debugging

    return quicker


def _broadcast_unless_equal(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    """Blocks of one shape are as they should be."""

    def broadcast_unless_equal(self: Any, lhs: Any, rhs: Any) -> Any:
        left, right = lhs.type, rhs.type
        equal = left.is_block() and right.is_block() and left.shape is right.shape
        return (lhs, rhs) if equal else broadcast(self, lhs, rhs)

    return broadcast_unless_equal


def _quicken_types(core: Any) -> None:
    """Types of blocks of one shape share what follows from it, where types and tensors hold what they do here."""
    kind = core.block_type(core.float32, [1])
    if vars(kind).keys() != BLOCK_TYPE or vars(core.tensor(None, kind)).keys() != TENSOR:
        return
    shapes: dict[tuple[Any, ...], tuple[Any, int, str]] = {}
    of_tensors: dict[int, tuple[Any, Any]] = {}
    scalar = core.tensor(None, core.float32)

    def quicker_type(make: Callable[..., None]) -> Callable[..., None]:
        def make_block_type(self: Any, element_ty: Any, shape: Any) -> None:
            sizes = tuple(shape) if type(shape) is list or type(shape) is core.tuple else (None,)
            simple = all(type(size) is int for size in sizes)
            known = shapes.get(sizes) if simple else None
            if known is None:
                make(self, element_ty, shape)
                if simple:
                    shapes[sizes] = self.shape, self.numel, str(self.shape)
                    tensor = core.tensor(None, self)
                    of_tensors[id(self.shape)] = tensor.numel, tensor.shape
                return
            self.element_ty = element_ty
            self.shape, self.numel, words = known
            self.name = f"<{words}, {element_ty}>"

        return make_block_type

    def quicker_tensor(make: Callable[..., None]) -> Callable[..., None]:
        def make_tensor(self: Any, handle: Any, type: Any) -> None:  # noqa: A002 - as Triton names it
            known = of_tensors.get(id(type.shape)) if type.is_block() else (scalar.numel, scalar.shape)
            if known is None:
                make(self, handle, type)
                return
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.numel, self.shape = known

        return make_tensor

    def quicker_comparison(compare: Callable[..., Any]) -> Callable[..., Any]:
        def is_equal(self: Any, other: Any) -> Any:
            plain = type(self) is core.dtype and type(other) is core.dtype
            return self.name == other.name if plain else compare(self, other)

        return is_equal

    _replace(core.block_type, "__init__", quicker_type)
    _replace(core.tensor, "__init__", quicker_tensor)
    _replace(core.dtype, "__eq__", quicker_comparison)

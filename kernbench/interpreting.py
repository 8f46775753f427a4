"""Makes Triton's interpreter quicker, without a change to what it computes.

Its language is patched once for a launch, not again for every call of a device function, which ``tl.sum``, ``tl.zeros``
and every ``@triton.jit`` helper are: that took a quarter to nearly half of the time of our kernels. And NumPy's dtype
for one of Triton's is looked up, where a table of all was made for each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def quicken() -> None:
    """Do so for this process, where there is Triton and its interpreter has what is to be replaced."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch, scope = (getattr(interpreter, name, None) for name in ("_patch_lang", "_LangPatchScope"))
    if patch is not None and scope is not None and not hasattr(patch, "__wrapped__"):
        interpreter._patch_lang = _unless_patched(patch, scope, interpreter.tl)
    dtype_of = getattr(interpreter, "_get_np_dtype", None)
    if dtype_of is not None and not hasattr(dtype_of, "__wrapped__"):
        interpreter._get_np_dtype = _remembered(dtype_of, interpreter.tl.dtype)


def _unless_patched(patch: Callable[[Any], Any], scope: Callable[[], Any], language: Any) -> Callable[[Any], Any]:
    """``patch``, but for a function whose language is patched already: by the launch that it is called in."""
    core = language.core

    def patched(module: Any) -> bool:
        # Tensors and descriptors belong to all modules, and are restored after a launch where a module may be left.
        members = module.load, module.tensor.__add__, core.tensor_descriptor_base.load
        return not any(core.is_builtin(member) for member in members)

    @functools.wraps(patch)
    def patch_unless_patched(function: Any) -> Any:
        modules = [found for found in function.__globals__.values() if found is language or found is core]
        return scope() if modules and all(map(patched, modules)) else patch(function)

    return patch_unless_patched


def _remembered(dtype_of: Callable[[Any], Any], scalar: type) -> Callable[[Any], Any]:
    """``dtype_of`` that remembers what it said of scalar types; others cannot be keys."""
    remembered = functools.cache(dtype_of)

    @functools.wraps(dtype_of)
    def dtype_of_scalar_or_other(kind: Any) -> Any:
        return remembered(kind) if type(kind) is scalar else dtype_of(kind)

    return dtype_of_scalar_or_other

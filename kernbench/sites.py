"""Finds what a site names, and puts something else there so that taking it out again leaves no trace."""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from kernbench.errors import KernbenchError
from kernbench.workload import Site

ABSENT = object()
IMMUTABLE_TYPE = 1 << 8
"""Py_TPFLAGS_IMMUTABLETYPE of CPython: attributes of the type cannot be set."""
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@dataclass(frozen=True)
class Attribute:
    """An attribute of a class or a module; ``raw`` is what stands there, descriptor and all."""

    owner: type | ModuleType
    name: str
    raw: Any

    @property
    def key(self) -> tuple[int, str]:
        """Equal for two sites that name one attribute, however they spell it."""
        return id(self.owner), self.name


def display(site: Site) -> str:
    """How a site is called in receipts and traces: ``NeuralMemory.update``, or the glob itself."""
    if isinstance(site, tuple):
        owner, name = site
        return f"{owner.__name__.rpartition('.')[2]}.{name}"
    return ".".join(site.partition(":")[2].split(".")[-2:]) if ":" in site else site


def is_glob(site: Site) -> bool:
    """Whether the site matches modules of a built model and so can only be resolved there."""
    return isinstance(site, str) and ":" not in site


def resolve(site: Site) -> Attribute:
    """The attribute that an (owner, name) or dotted site names.

    Raises:
        KernbenchError: the module cannot be imported, nothing is there, or it cannot be replaced.
    """
    owner, name = site if isinstance(site, tuple) else _walk(site)
    getattr(owner, name, None)  # a module that loads its attributes on first use does it now
    raw = inspect.getattr_static(owner, name, ABSENT)
    if raw is ABSENT:
        close = difflib.get_close_matches(name, dir(owner), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise KernbenchError(
            f"site {display(site)} matches nothing: {_describe(owner)} has no attribute {name!r}{hint}"
        )
    if isinstance(raw, type):
        raise KernbenchError(
            f"site {display(site)} is a class, and its instances exist already; name a method of it or a module glob"
        )
    if isinstance(owner, type) and owner.__flags__ & IMMUTABLE_TYPE:
        raise KernbenchError(
            f"site {display(site)} is part of the built-in type {owner.__name__}, which cannot be changed"
        )
    if not callable(raw) and not isinstance(raw, property | staticmethod | classmethod):
        raise KernbenchError(
            f"site {display(site)} holds a {type(raw).__name__}; a swap replaces functions and properties"
        )
    return Attribute(owner, name, raw)


def _walk(site: str) -> tuple[type | ModuleType, str]:
    module_name, _, path = site.partition(":")
    try:
        owner: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise KernbenchError(f"site {site!r} matches nothing: {error}; install it or correct the site") from error
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent, ABSENT)
        if not isinstance(owner, type | ModuleType):
            raise KernbenchError(f"site {site!r} matches nothing: {parent!r} is no class or module in {module_name}")
    return owner, name


def _describe(owner: type | ModuleType) -> str:
    return f"class {owner.__name__}" if isinstance(owner, type) else f"module {owner.__name__}"


def in_kind(raw: Any, replacement: Any, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Any:
    """``replacement``, wrapped, as the kind of descriptor that ``raw`` is: a static method for a static method."""
    if isinstance(raw, property):
        if isinstance(replacement, property):
            getter = wrap(replacement.fget) if replacement.fget else None
            return property(getter, replacement.fset, replacement.fdel, replacement.__doc__)
        return property(wrap(replacement), raw.fset, raw.fdel, raw.__doc__)
    if isinstance(replacement, staticmethod | classmethod):
        return type(replacement)(wrap(replacement.__func__))
    if isinstance(raw, staticmethod | classmethod):
        return type(raw)(wrap(replacement))
    return wrap(replacement)


@dataclass
class AttributePatch:
    """Puts ``value`` at an attribute. Installs and restores nest like brackets; restoring twice does no harm."""

    target: Attribute
    value: Any

    def found(self) -> Any:
        """What the owner itself holds now; ABSENT where the attribute is inherited."""
        return vars(self.target.owner).get(self.target.name, ABSENT)

    def install(self) -> None:
        setattr(self.target.owner, self.target.name, self.value)

    def restore(self, found: Any) -> None:
        if found is not ABSENT:
            setattr(self.target.owner, self.target.name, found)
        elif self.found() is not ABSENT:
            delattr(self.target.owner, self.target.name)


@dataclass
class ForwardPatch:
    """Puts ``value`` in the place of one module's ``forward``, on the instance."""

    module: torch.nn.Module
    value: Callable[..., Any]

    def found(self) -> Any:
        return vars(self.module).get("forward", ABSENT)

    def install(self) -> None:
        vars(self.module)["forward"] = self.value

    def restore(self, found: Any) -> None:
        if found is ABSENT:
            vars(self.module).pop("forward", None)
        else:
            vars(self.module)["forward"] = found


@dataclass
class ModulePatch:
    """Puts ``replacement`` in the place of a submodule, in its training mode."""

    parent: torch.nn.Module
    name: str
    replacement: torch.nn.Module

    def found(self) -> Any:
        module = self.parent._modules[self.name]
        return module, getattr(module, "training", True)

    def install(self) -> None:
        training = self.found()[1]
        if self.replacement.training != training:
            self.replacement.train(training)
        self.parent._modules[self.name] = self.replacement

    def restore(self, found: Any) -> None:
        module, training = found
        if self.parent._modules[self.name] is module:
            return
        self.parent._modules[self.name] = module
        # model.eval() while the replacement was in reached only the replacement.
        if self.replacement.training != training:
            module.train(self.replacement.training)


Patch = AttributePatch | ForwardPatch | ModulePatch


@dataclass(frozen=True)
class Match:
    """One place in a model that holds a matched module; a shared module has several."""

    path: str
    parent: torch.nn.Module
    name: str
    module: torch.nn.Module


def matches(model: torch.nn.Module, glob: str) -> Iterator[Match]:
    """Submodules whose dotted name fits ``glob`` (``*`` also spans dots); of nested matches only the outermost.

    The ``_orig_mod`` that torch.compile puts into names is left out of them.
    """
    taken: list[str] = []
    for full, module in model.named_modules(remove_duplicate=False):
        path = ".".join(part for part in full.split(".") if part != "_orig_mod")
        if not path or full.endswith("_orig_mod") or any(path.startswith(f"{outer}.") for outer in taken):
            continue
        if fnmatch.fnmatchcase(path, glob):
            taken.append(path)
            parent, _, name = full.rpartition(".")
            yield Match(path, model.get_submodule(parent), name, module)


def keep_hooks(module: torch.nn.Module, replacement: torch.nn.Module) -> None:
    """Let the replacement run the module's hooks. Shared, not copied, so that a handle still removes its hook.

    A replacement that contains the module calls it, and with it the hooks, so it gets none of its own.
    """
    if any(inner is module for inner in replacement.modules()):
        return
    for name in HOOKS:
        theirs, ours = getattr(module, name), getattr(replacement, name)
        if ours:
            ours.update(theirs)
        else:
            vars(replacement)[name] = theirs
    if module._is_full_backward_hook is not None:
        vars(replacement)["_is_full_backward_hook"] = module._is_full_backward_hook

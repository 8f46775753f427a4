"""Watches Triton's interpreter: which programs of a launch run, and whether each address lies inside a tensor.

The interpreter dereferences whatever a kernel computes, so a wrong address there is a segmentation fault or, worse, a
plausible number. Under :func:`watched` it is a sentence, before anything is read or written.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from kernbench.errors import KernbenchError
from kernbench.parity.sparse import Memory, Region

Program = tuple[int, int, int]
ENOUGH = 10
"""Programs of a launch that are run in any case; the others only as long as the launch has time."""
GRID_LIMITS: Program = (2**31 - 1, 65535, 65535)
"""Programs that a GPU launches at most in each direction. Source: CUDA programming guide, compute capabilities."""
WRAP = 2**31


class Stopped(Exception):  # noqa: N818 - the call is ended on purpose
    """Ends the call under watch; why stands in the :class:`Watch`."""


@dataclass
class Watch:
    """What the interpreter did.

    Attributes:
        wrong: the wrong access that ended the call, in words.
        unlaunchable: why a GPU could not launch what the call launched.
        late: what was left undone when the time was up.
        launches: launches begun.
        programs: programs that ran to their end.
        beyond: some access lay beyond 2^31 elements of its tensor.
        launch_seconds: after which the less telling programs of a launch are left out.
    """

    memory: Memory
    choose: Callable[[Program], Sequence[Program]]
    deadline: float
    launch_seconds: float = math.inf
    wrong: str = ""
    unlaunchable: str = ""
    late: str = ""
    launches: int = 0
    programs: int = 0
    beyond: bool = False
    function: str = ""
    grid: Program = (0, 0, 0)
    chosen: Sequence[Program] = field(default_factory=list)
    at: int = -1
    launched_at: float = 0.0
    enough: bool = False

    @property
    def over(self) -> bool:
        return bool(self.wrong or self.unlaunchable or self.late)

    def begin(self, grid: Sequence[Any]) -> tuple[int]:
        """Take note of a launch's grid; how many of its programs are to run."""
        x, y, z = (*map(operator.index, grid), 1, 1, 1)[:3]
        self.grid, self.at, self.enough = (x, y, z), -1, False
        for axis, size, limit in zip("xyz", self.grid, GRID_LIMITS, strict=True):
            if size > limit:
                self.unlaunchable = (
                    f"{self.function} is launched on a grid of {self.grid}, and a GPU takes at most {limit} programs "
                    f"in {axis}"
                )
                raise Stopped
        self.launches += 1
        self.launched_at = time.thread_time()
        self.chosen = self.choose(self.grid)
        return (len(self.chosen),)

    def poll(self) -> None:
        """Ends the call when its time is up."""
        if time.thread_time() > self.deadline:
            where = f"program {self.chosen[self.at]} of {self.function}" if self.at >= 0 else "host code"
            self.late = f"the time was up in {where}, after {self.programs} programs"
            raise Stopped

    def access(self, pointers: Any, mask: Any, verb: str) -> None:
        """Hold every address that a load or store is about to use against the tensors."""
        self.poll()
        addresses = pointers.data
        allowed = mask.data if mask is not None else None
        if allowed is not None:
            addresses = addresses[np.broadcast_to(allowed.astype(bool), addresses.shape)]
        addresses = np.asarray(addresses, dtype=np.uint64).reshape(-1)
        if not addresses.size:
            return
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        bad = self.memory.touch(addresses, width)
        if bad is not None:
            self.wrong = self._words(bad, width, verb)
            raise Stopped
        last = self.memory.last_at_most(int(addresses.max()))
        if last is not None and int(addresses.max()) - last.start >= WRAP * last.itemsize:
            self.beyond = True

    def _words(self, address: int, width: int, verb: str) -> str:
        region = self.memory.nearest(address)
        where = "at an address that belongs to no tensor" if region is None else _place(address, width, region)
        return f"program {self.chosen[self.at]} of {self.function} {verb} {width} bytes {where}{_kernel_line()}"


def _place(address: int, width: int, region: Region) -> str:
    element = (address - region.start) // region.itemsize
    name = region.name or "a tensor that the call makes"
    if region.bytes and (address < region.space[0] or address >= region.space[1]) and abs(element) > 2 * WRAP:
        return f"at address {address:#x}, which belongs to no tensor"
    if address < region.start:
        wraps = element >= -WRAP and region.elements > WRAP // 8
        cause = ": a 32-bit offset overflows" if wraps and element < -WRAP // 64 else ""
        return f"at element {element} of {name}, before its beginning{cause}"
    if not region.bytes:
        return f"at element {element} of {name}, which is empty"
    return f"at element {element} of {name}, past its last element {region.elements - 1}"


def _kernel_line() -> str:
    """Where the kernel is, as `` (kernels/x.py:41)``: the innermost line that is neither Triton's nor ours."""
    frame: FrameType | None = sys._getframe(1)
    triton_folder = str(Path(sys.modules["triton"].__file__ or "").parent)
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__ and not file.startswith((triton_folder, "<")):
            path = Path(file)
            return f" ({path.parent.name}/{path.name}:{frame.f_lineno})"
        frame = frame.f_back
    return ""


@contextmanager
def watched(
    memory: Memory,
    choose: Callable[[Program], Sequence[Program]],
    deadline: float,
    launch_seconds: float = math.inf,
) -> Iterator[Watch]:
    """Interpreted launches in here run the chosen programs only, in that order, on the memory that they were given.

    Args:
        choose: the programs of a grid to run, the most telling first.
        deadline: when to end the call, in seconds of ``time.thread_time``, which other processes do not use up.
        launch_seconds: as in :class:`Watch`.

    Raises:
        KernbenchError: Triton does not interpret here, or its interpreter is built otherwise.
    """
    interpreter = _interpreter()
    watch = Watch(memory, choose, deadline, launch_seconds)
    executor, builder = interpreter.GridExecutor, interpreter.interpreter_builder
    with ExitStack() as undo:

        def swap(owner: Any, name: str, value: Any) -> None:
            own = vars(owner).get(name)
            setattr(owner, name, value)
            undo.callback(lambda: delattr(owner, name) if own is None else setattr(owner, name, own))

        # Copies of the arguments to the host and back would touch all of their memory.
        swap(executor, "_init_args_hst", _typed_arguments(interpreter))
        swap(executor, "_restore_args_dev", lambda self, *ignored: None)
        swap(executor, "__call__", _launch(watch, executor.__call__))
        swap(builder, "set_grid_dim", lambda *sizes: setattr(builder, "grid_dim", watch.grid))
        swap(builder, "set_grid_idx", _step(watch, builder))
        typed_range = _typed_range(interpreter)
        swap(interpreter, "range", typed_range)
        swap(interpreter.InterpretedFunction, "rewrite", _rewrite(interpreter, typed_range, swap))
        for name, (verb, pointers, mask) in ACCESSES.items():
            swap(builder, name, _checked(watch, getattr(builder, name), verb, pointers, mask))
        yield watch


ACCESSES = {
    "create_masked_load": ("reads", 0, 1),
    "create_masked_store": ("writes", 0, 2),
    "create_atomic_cas": ("exchanges", 0, None),
    "create_atomic_rmw": ("updates", 1, 3),
}
"""The interpreter's accesses to memory: what they do, and which arguments are the pointers and the mask."""
PARAMETERS = {
    "create_masked_load": ("ptrs", "mask"),
    "create_masked_store": ("ptrs", "value", "mask"),
    "create_atomic_cas": ("ptr", "cmp"),
    "create_atomic_rmw": ("rmwOp", "ptr", "val", "mask"),
    "set_grid_dim": ("nx", "ny", "nz"),
    "set_grid_idx": ("x", "y", "z"),
}


def _interpreter() -> Any:
    import triton
    from triton.runtime import interpreter

    if not triton.knobs.runtime.interpret:
        raise KernbenchError("addresses are checked in Triton's interpreter; set TRITON_INTERPRET=1 before the import")
    executor, builder = getattr(interpreter, "GridExecutor", None), getattr(interpreter, "interpreter_builder", None)
    fits = all(hasattr(executor, name) for name in ("_init_args_hst", "_restore_args_dev", "__call__")) and all(
        tuple(inspect.signature(getattr(builder, name, print)).parameters)[: len(names)] == names
        for name, names in PARAMETERS.items()
    )
    if not fits:
        raise KernbenchError(
            f"addresses cannot be checked with Triton {triton.__version__}: its interpreter is built otherwise than in "
            "3.6 to 3.9; install one of these"
        )
    return interpreter


def _wide(interpreter: Any, value: int) -> Any:
    """An integer that is 64 bits wide in a kernel, however small it is."""
    language = interpreter.tl
    handle = interpreter.TensorHandle(np.array([value], dtype=np.int64), language.int64)
    return language.tensor(handle, language.int64)


def _typed_arguments(interpreter: Any) -> Callable[..., Any]:
    """Passes arguments on as they are, but for integers that a GPU gets as 64 bits and the interpreter would not."""
    from triton.runtime.jit import _normalize_ty

    def typed(executor: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        annotations = inspect.get_annotations(executor.fn)

        def widened(name: str, value: Any) -> Any:
            if type(value) is not int or name in executor.constexprs or not -(2**63) <= value < 2**63:
                return value
            declared = _normalize_ty(annotations[name]) if name in annotations else ""
            return _wide(interpreter, value) if declared == "i64" or not -WRAP <= value < WRAP else value

        named = zip(executor.arg_names, args, strict=False)
        return [widened(name, value) for name, value in named], {name: widened(name, kwargs[name]) for name in kwargs}

    return typed


def _typed_range(interpreter: Any) -> Callable[..., Any]:
    """Counts in 64 bits where a bound has them, as on a GPU; the interpreter itself counts in Python's integers."""
    language = interpreter.tl

    def whole(bound: Any) -> Any:
        # Not by its __index__: that of Triton 3.6 does not go together with NumPy 2.4.
        return int(bound.handle.data.item()) if isinstance(bound, language.tensor) else bound

    def typed(*bounds: Any) -> Any:
        if any(isinstance(bound, language.tensor) and bound.dtype == language.int64 for bound in bounds):
            return (_wide(interpreter, value) for value in range(*map(whole, bounds)))
        return range(*map(whole, bounds))

    return typed


def _rewrite(interpreter: Any, typed_range: Any, swap: Callable[[Any, str, Any], None]) -> Callable[..., Any]:
    original = interpreter.InterpretedFunction.rewrite

    def rewrite(function: Any) -> Any:
        rewritten = original(function)
        module = sys.modules.get(rewritten.__module__)
        if module is not None and vars(module) is rewritten.__globals__ and "range" not in vars(module):
            swap(module, "range", typed_range)
        return rewritten

    return rewrite


def _launch(watch: Watch, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        watch.poll()
        watch.function = executor.fn.__name__
        for name, value in (*zip(executor.arg_names, args, strict=False), *kwargs.items()):
            tensor = getattr(value, "base", value)
            if hasattr(tensor, "untyped_storage"):
                watch.memory.know(tensor, name)
        grid = executor.grid
        executor.grid = lambda named: watch.begin(grid(named) if callable(grid) else grid)
        try:
            original(executor, *args, **kwargs)
        except Exception:
            if watch.over:
                raise Stopped from None
            if not watch.enough:
                raise
        else:
            watch.programs += len(watch.chosen) > 0
        finally:
            executor.grid = grid
        watch.at = -1

    return launch


def _step(watch: Watch, builder: Any) -> Callable[[int, int, int], None]:
    def step(x: int, y: int, z: int) -> None:
        watch.programs += x > 0
        watch.at = x
        watch.poll()
        if x >= ENOUGH and time.thread_time() - watch.launched_at > watch.launch_seconds:
            watch.enough = True
            raise Stopped
        builder.grid_idx = watch.chosen[x]

    return step


def _checked(
    watch: Watch, original: Callable[..., Any], verb: str, pointers: int, mask: int | None
) -> Callable[..., Any]:
    @functools.wraps(original)
    def checked(*args: Any, **kwargs: Any) -> Any:
        watch.access(args[pointers], None if mask is None else args[mask], verb)
        return original(*args, **kwargs)

    return checked

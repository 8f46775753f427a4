"""Names the source line of every read of a tensor by the host, explicit or implicit.

Two modes watch together. The function mode sees what the program wrote (``.tolist()``, ``print``, ``.to("cpu")``); the
dispatch mode sees the operators underneath (``aten::_local_scalar_dense``, ``aten::nonzero``) with the tensors they
touch. On a machine without a GPU the watch also plays the device, see :mod:`kernbench.watching.taint`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch._C import DispatchKey, DispatchKeySet
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode

from kernbench.record import HostRead
from kernbench.watching import syncrules
from kernbench.watching.sourcelines import SourceTable
from kernbench.watching.taint import ActualSides, MarkedSides, storage_of, tensors_in

current_phase: ContextVar[int | None] = ContextVar("kernbench_phase", default=None)
"""The phase whose site is running; set by whoever annotates sites, stored with each read."""

Handler = Callable[..., Any]
_TORCH = str(torch.__path__[0]) + "/"
_MODULES = _TORCH + "nn/modules/"
_CHECKPOINT = _TORCH + "utils/checkpoint.py"
_HOST = torch.device("cpu")
# Attributes of torch._C are typed as descriptors whose __get__ is made anew each time; they compare equal.
_DEVICE_OF = torch.Tensor.device.__get__


class SyncWatch:
    """Records reads between ``begin_step`` and ``end_step``, while entered as a context manager.

    With ``marker`` (the device that workloads are built for on a machine without a GPU) the workload must be built
    inside the watch, so that its tensors carry marks. Threads other than the one that entered are not watched, except
    the autograd engine's own.
    """

    def __init__(self, sources: SourceTable, *, marker: torch.device | None) -> None:
        self.sources = sources
        self.reads: list[HostRead] = []
        self.op_lines: dict[str, list[int]] = {}
        self._marker = marker
        self._marks = None if marker is None else MarkedSides()
        self._sides = self._marks or ActualSides()
        self._step: int | None = None
        self._record_ops = False
        self._muted = 0
        self._calls: list[tuple[str, tuple[Any, ...]]] = []
        self._functions = _FunctionMode(self)
        self._operators = _DispatchMode(self)
        self._bodies: dict[Any, syncrules.Body] = {}
        self._stack = ExitStack()
        self._handlers = self._make_handlers()

    def __enter__(self) -> SyncWatch:
        with ExitStack() as stack:
            # One call of a compiled function under a dispatch mode would switch its compilation off for good.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(_attribute(torch.autograd, "_engine_run_backward", self._watched_engine))
            stack.enter_context(self._functions)
            stack.enter_context(self._operators)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def begin_step(self, index: int, *, record_ops: bool = False) -> None:
        """Record from here on, as step ``index``; ``record_ops`` starts :attr:`op_lines` afresh."""
        self._step, self._record_ops = index, record_ops
        if record_ops:
            self.op_lines = {}

    def end_step(self) -> None:
        """Stop recording."""
        self._step, self._record_ops = None, False

    def _watched_engine(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Custom ``backward`` methods run inside ``torch.autograd.backward``, where torch has taken the mode away."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self._functions_again():
                return original(*args, **kwargs)

        return run

    def _functions_again(self) -> AbstractContextManager[Any]:
        modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        return nullcontext() if any(mode is self._functions for mode in modes) else self._functions

    def _run(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator, and watch inside where its body is made of further operators."""
        body = self._bodies.get(operator)
        if body is None:
            body = self._bodies[operator] = syncrules.body(operator)
        if body is syncrules.Body.LEAF:
            return operator(*args, **kwargs)
        if body is syncrules.Body.COMPOSITE:
            with self._operators:
                return operator.decompose(*args, **kwargs)
        on_cuda = any(tensor.is_cuda for tensor in [*tensors_in(args), *tensors_in(kwargs.values())])
        keys = DispatchKeySet(DispatchKey.CUDA if on_cuda else DispatchKey.CPU)
        with torch._C._EnableTorchFunction(), self._functions_again(), self._operators:
            return operator.redispatch(keys, *args, **kwargs)

    # What the modes report.

    def on_function(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one torch function of the program, and record the reads that only show at this level."""
        if self._marks is not None and function == _DEVICE_OF and self._marks.holds(args[0]):
            # Checkpointing compares devices that it noted inside torch's own functions, where no mode answers.
            return function(*args) if _caller() == _CHECKPOINT else self._marker
        name = getattr(function, "__name__", "")
        self._calls.append((name, args))
        try:
            handler = self._handlers.get(function)
            if handler is not None:
                return handler(function, args, kwargs)
            result = function(*args, **kwargs)
        finally:
            self._calls.pop()
        if self._marks is not None and kwargs.get("device") is not None:
            self._settle(result, self._target(kwargs["device"]))
        return result

    def on_operator(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operator, record its reads, and mark what it made."""
        name = operator._schema.name
        if self._record_ops and not name.startswith("profiler::"):
            self._note_operator(name)
        rule = syncrules.RULES.get(name)
        if rule is not None and self._step is not None and not self._muted:
            for read in rule(args, kwargs, self._sides):
                shown, form = syncrules.describe(name, self._calls[-1][0] if self._calls else "")
                self._record(shown, read.form or form, host=read.host_tensor)
                if self._record_ops and shown not in (name, "aten::item"):
                    self._note_operator(shown)
        result = self._run(operator, args, kwargs)
        if self._marks is not None:
            self._mark_results(args, kwargs, result)
        return result

    def _note_operator(self, name: str) -> None:
        line = self._line()
        names = (name, "aten::item") if name == "aten::_local_scalar_dense" else (name,)
        for shown in names:
            self.op_lines.setdefault(shown, []).append(-1 if line is None else line)

    def _line(self) -> int | None:
        return self.sources.locate(sys._getframe(2))

    def _record(self, operator: str, form: str, *, host: bool) -> None:
        if self._step is None or self._muted:
            return
        line = self._line()
        if line is None:
            return
        read = HostRead(
            step=self._step,
            line=self.sources.nowhere() if line == -1 else line,
            op=operator,
            form=form,
            host_tensor=host,
            real=False,
            phase=current_phase.get(),
        )
        self.reads.append(read)

    # Marks, on a machine without a GPU.

    def _mark_results(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Results are the device's if the call names it, if any operand is, or if they are born inside such a call."""
        assert self._marks is not None
        operands = [*tensors_in(args), *tensors_in(kwargs.values())]
        on_device = self._marks.names(kwargs.get("device")) or any(map(self._marks.holds, operands))
        if not on_device and not operands and self._calls:
            on_device = any(map(self._marks.holds, tensors_in(self._calls[-1][1])))
        if not on_device:
            return
        storages = {storage._cdata for storage in map(storage_of, operands) if storage is not None}
        for tensor in tensors_in(result if isinstance(result, (list, tuple)) else (result,)):
            storage = storage_of(tensor)
            if storage is not None and storage._cdata not in storages:
                self._marks.mark(tensor)

    def _settle(self, result: Any, on_device: bool | None) -> None:
        """Put freshly made tensors on the side that the program asked for."""
        if self._marks is None or on_device is None:
            return
        for tensor in tensors_in((result,)):
            (self._marks.mark if on_device else self._marks.unmark)(tensor)

    def _target(self, device: Any) -> bool | None:
        """The side that ``device=`` asks for; None where torch itself passes on the plain "cpu" of a marked tensor."""
        return True if self._sides.names(device) else None if _called_by_torch() else False

    # Torch functions whose reads do not show in the dispatcher, or show as something else.

    def _make_handlers(self) -> dict[Any, Handler]:
        tensor = torch.Tensor
        handlers: dict[Any, Handler] = {
            tensor.tolist: self._to_python,
            tensor.numpy: self._to_numpy,
            tensor.__array__: self._to_numpy,
            tensor.__repr__: self._printed,
            tensor.__format__: self._printed,
            torch.nn.functional.one_hot: self._one_hot,
            **dict.fromkeys((torch.tensor, torch.as_tensor, torch.asarray, tensor.new_tensor), self._from_data),
        }
        if self._marks is not None:
            handlers |= {tensor.to: self._to, tensor.type_as: self._to, tensor.cpu: self._to_host}
            handlers[tensor.__deepcopy__] = self._deep_copied
        return handlers

    @contextmanager
    def _mute(self) -> Iterator[None]:
        self._muted += 1
        try:
            yield
        finally:
            self._muted -= 1

    def _to_python(self, function: Handler, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._record("aten::tolist", "tolist", host=not self._sides.holds(args[0]))
        with self._mute():
            return function(*args, **kwargs)

    def _to_numpy(self, function: Handler, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A NumPy array of a host tensor is a view, so nothing is read."""
        if self._sides.holds(args[0]):
            self._record(f"Tensor.{function.__name__}", "numpy", host=False)
        with self._mute():
            return function(*args, **kwargs)

    def _printed(self, function: Handler, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        scalar = function.__name__ == "__format__" and args[0].dim() == 0
        operator = "aten::item" if scalar else f"Tensor.{function.__name__}"
        form = "format" if function.__name__ == "__format__" else "print"
        self._record(operator, form, host=not self._sides.holds(args[0]))
        with self._mute():
            return function(*args, **kwargs)

    def _one_hot(self, function: Handler, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The CPU checks the range of the classes, which a GPU does not; both look for their number if not told it."""
        classes = kwargs.get("num_classes", args[1] if len(args) > 1 else -1)
        if classes == -1:
            self._record("aten::item", "one_hot", host=not self._sides.holds(args[0]))
        with self._mute():
            return function(*args, **kwargs)

    def _from_data(self, function: Handler, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``torch.tensor`` and its kind: data from Python is copied to the device, and tensors in a list are read."""
        is_method = function is torch.Tensor.new_tensor
        data = args[1] if is_method and len(args) > 1 else kwargs.get("data", kwargs.get("obj", args[0]))
        device = kwargs.get("device", next((item for item in args[1:] if isinstance(item, torch.device)), None))
        source = isinstance(data, torch.Tensor) and self._sides.holds(data)
        default = self._sides.holds(args[0]) if is_method else source
        for tensor in _scalars_in(data):
            self._record("aten::item", "tensor", host=not self._sides.holds(tensor))
        with self._mute():
            result = function(*args, **kwargs)
        if self._marks is None:
            target = self._sides.holds(result)
        else:
            asked = None if device is None else self._target(device)
            target = default if device is None else bool(asked)
            if source and not target and result.data_ptr() == data.data_ptr():
                result = result.clone()
            self._settle(result, target)
        if source != target:
            self._record("aten::_to_copy", "copy", host=False)
        return result

    def _to_host(self, function: Handler, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._move(args[0], target=False, dtype=None, keywords=kwargs)

    def _to(self, function: Handler, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``Tensor.to``: nothing moves on a machine without a GPU, so the watch copies where a GPU's copy would be."""
        other = kwargs.get("other", args[1] if len(args) > 1 else None)
        if isinstance(other, torch.Tensor):
            keywords = {key: value for key, value in kwargs.items() if key != "other"}
            return self._move(args[0], target=self._sides.holds(other), dtype=other.dtype, keywords=keywords)
        keywords = {key: value for key, value in kwargs.items() if key != "copy"}
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args[1:], **keywords)
        if device is None or device.type != _HOST.type:
            return function(*args, **kwargs)
        given = {"non_blocking": non_blocking, "copy": kwargs.get("copy", args[4] if len(args) > 4 else False)}
        if memory_format is not None:
            given["memory_format"] = memory_format
        return self._move(args[0], target=self._target(device), dtype=dtype, keywords=given)

    def _move(
        self, tensor: torch.Tensor, *, target: bool | None, dtype: torch.dtype | None, keywords: dict[str, Any]
    ) -> torch.Tensor:
        assert self._marks is not None
        source = self._marks.holds(tensor)
        if target is None or target == source:
            return tensor.to(dtype=dtype or tensor.dtype, **keywords)
        if not keywords.get("non_blocking"):
            self._record("aten::_to_copy", "copy", host=False)
        with self._mute():
            result = tensor.to(dtype=dtype or tensor.dtype, **keywords)
            if result.data_ptr() == tensor.data_ptr():
                result = result.clone()
        self._settle(result, target)
        return result

    def _deep_copied(self, function: Handler, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._mute():
            result = function(*args, **kwargs)
        self._settle(result, self._sides.holds(args[0]))
        return result


def _caller() -> str:
    """File of the code that made the call which the watch is handling."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return frame.f_code.co_filename


def _called_by_torch() -> bool:
    """Whether torch's own code, rather than the program or ``Module.to``, made the call that a handler is in.

    torch.optim and clip_grad_norm_ group tensors by device in C++, where a marked tensor's device is plain "cpu".
    """
    file = _caller()
    return file.startswith(_TORCH) and not file.startswith(_MODULES)


def _scalars_in(data: Any) -> list[torch.Tensor]:
    """Tensors in (nested) lists of numbers."""
    if not isinstance(data, (list, tuple)):
        return []
    found = []
    for item in data:
        found.extend([item] if isinstance(item, torch.Tensor) else _scalars_in(item))
    return found


@contextmanager
def _attribute(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


class _FunctionMode(TorchFunctionMode):
    def __init__(self, watch: SyncWatch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._watch.on_function(func, args, kwargs or {})


class _DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, watch: SyncWatch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watch = watch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # The operators that the watch itself calls must not come back as functions of the program.
        with torch._C.DisableTorchFunction():
            return self._watch.on_operator(func, args, kwargs or {})

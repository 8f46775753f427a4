"""Finds arithmetic on bfloat16 numbers as they were loaded, which Triton's interpreter gets wrong without a word.

The interpreter keeps bfloat16 as 16-bit integers. It moves them rightly, and casts to and from float32 rightly but for
the rounding; it adds, multiplies, orders and sums their bits. A kernel whose check passes nevertheless passes by
accident, so parity runs inside :func:`watching` and reports each such line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import triton

from kernbench.errors import KernbenchError

MOVES = frozenset(
    f"create_{name}" for name in (
        "load", "masked_load", "store", "masked_store", "descriptor_load", "descriptor_store", "descriptor_gather",
        "descriptor_scatter", "make_tensor_descriptor", "atomic_load", "atomic_store", "select", "reshape", "trans",
        "expand_dims", "broadcast", "cat", "join", "split", "splat", "unsplat", "gather", "bitcast", "fp_to_fp",
        "fabs", "print", "barrier", "addptr",
    )
)  # fmt: skip
"""What the interpreter does rightly with the bits alone; of an absolute value it clears the sign bit."""
CASTS = frozenset(
    f"create_{name}" for name in ("fp_ext", "fp_trunc", "si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "int_cast")
)
"""Casts, which know no other way to and from bfloat16 than float32."""
VERBS = {
    "fadd": "adds", "fsub": "subtracts", "fmul": "multiplies", "fdiv": "divides", "frem": "divides", "fneg": "negates",
    "fma": "multiplies", "dot": "multiplies matrices of", "clampf": "clamps", "minimumf": "compares",
    "maximumf": "compares", "minnumf": "compares", "maxnumf": "compares", "atomic_rmw": "updates atomically",
    "reduce": "reduces", "scan": "scans",
}  # fmt: skip
ADVICE = "Triton's interpreter computes with their bits: cast with .to(tl.float32) first"
_TRITON = str(Path(triton.__file__).parent)


@dataclass
class Watch:
    """What was found, each line of source and operation once, in the order in which it ran."""

    findings: list[str] = field(default_factory=list)

    def report(self, operation: str) -> None:
        verb = "compares" if operation.startswith(("fcmp", "icmp")) else VERBS.get(operation, f"applies {operation} to")
        self._add(f"{verb} bfloat16 numbers as they were loaded; {ADVICE}")

    def report_cast(self, source: str, target: str) -> None:
        self._add(
            f"casts {source} to {target}; Triton's interpreter casts to and from bfloat16 by way of float32 alone: "
            "cast with .to(tl.float32) in between"
        )

    def _add(self, words: str) -> None:
        finding = f"{_place()}: {words}"
        if finding not in self.findings:
            self.findings.append(finding)


@contextmanager
def watching() -> Iterator[Watch]:
    """Kernels interpreted inside report what they compute from raw bfloat16 numbers; compiled ones report nothing.

    Raises:
        KernbenchError: Triton's interpreter is not built as it is in Triton 3.6 to 3.9.
    """
    interpreter = _interpreter()
    watch = Watch()
    builder, reducer = interpreter.InterpreterBuilder, interpreter.ReduceScanOpInterface
    replaced: list[tuple[Any, str, Any]] = []

    def replace(owner: Any, name: str, function: Any) -> None:
        replaced.append((owner, name, vars(owner)[name]))
        setattr(owner, name, function)

    for name, method in list(vars(builder).items()):
        if name.startswith("create_") and name not in MOVES and callable(method):
            plain = _watched(method, name.removeprefix("create_"), interpreter.TensorHandle, watch)
            replace(builder, name, _watched_cast(method, watch) if name in CASTS else plain)
    replace(reducer, "apply", _watched_reduction(reducer.apply, interpreter.ScanOps, watch))
    try:
        yield watch
    finally:
        for owner, name, original in reversed(replaced):
            setattr(owner, name, original)


def _interpreter() -> Any:
    """Triton's interpreter, with everything that is watched in it."""
    try:
        from triton.runtime import interpreter
    except ImportError as error:
        raise _unwatchable(str(error)) from error
    for name in ("InterpreterBuilder", "TensorHandle", "ReduceScanOpInterface", "ScanOps"):
        if not hasattr(interpreter, name):
            raise _unwatchable(f"it has no {name}")
    needed = {"create_fadd", "create_fmul", "create_fcmpOLT", "create_dot", "create_masked_load", *CASTS}
    lacking = sorted(needed - vars(interpreter.InterpreterBuilder).keys())
    if lacking or "apply" not in vars(interpreter.ReduceScanOpInterface):
        raise _unwatchable(f"its operations are not {', '.join(lacking) or 'reduced by apply'}")
    return interpreter


def _unwatchable(why: str) -> KernbenchError:
    return KernbenchError(
        f"the interpreter of Triton {metadata.version('triton')} cannot be watched for bfloat16 arithmetic: {why}; use "
        "Triton 3.6 to 3.9, or check bfloat16 on a GPU"
    )


def _dtype(handle: Any) -> str:
    """Name of the dtype; what a comparison gives bears that of what was compared, but is a byte wide."""
    name = str(handle.dtype.scalar.name)
    return "int1" if name == "bf16" and handle.data.itemsize == 1 else name


def _watched(method: Callable[..., Any], operation: str, handle: Any, watch: Watch) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        for value in args:
            if value.__class__ is handle and _dtype(value) == "bf16":
                watch.report(operation)
                break
        return method(*args, **kwargs)

    return call


def _watched_cast(method: Callable[..., Any], watch: Watch) -> Callable[..., Any]:
    def call(builder: Any, source: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
        names = _dtype(source), str(target.scalar.name)
        if "bf16" in names and "fp32" not in names and names[0] != names[1]:
            watch.report_cast(*(name.replace("bf16", "bfloat16") for name in names))
        return method(builder, source, target, *args, **kwargs)

    return call


def _watched_reduction(method: Callable[..., Any], scan: type, watch: Watch) -> Callable[..., Any]:
    def call(reducer: Any, given: Any) -> Any:
        for value in given if isinstance(given, tuple) else (given,):
            if value.dtype.scalar.name == "bf16":
                watch.report("scan" if isinstance(reducer, scan) else "reduce")
                break
        return method(reducer, given)

    return call


def _place() -> str:
    """File and line in the kernel that is running now, and where a helper was called from."""
    lines: list[str] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_qualname != "GridExecutor.__call__":
        file = frame.f_code.co_filename
        if file != __file__ and not file.startswith(_TRITON):
            lines.append(f"{'/'.join(Path(file).parts[-2:])}:{frame.f_lineno}")
        frame = frame.f_back
    if len(lines) == 1:
        return lines[0]
    return f"{lines[0]} (called from {lines[-1]})" if lines else "unknown place"

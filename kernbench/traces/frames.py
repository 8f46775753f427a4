"""Python calls of a trace: around which host rows they lie, and which of them belong to the user's program."""

from __future__ import annotations

import linecache
import re
import sys

import numpy as np

from kernbench.record import SourceLine
from kernbench.traces import nesting
from kernbench.traces.kineto import Columns
from kernbench.traces.nesting import ANNOTATION, Bools, Ints
from kernbench.traces.tracetables import Frames, Host

_CALL = re.compile(r"(.+)\((\d+)\): (.+)", re.DOTALL)
_MODULE = "nn.Module: "
# kernbench marks modules by their path: dots, names and numbers only.
_MODULE_PATH = re.compile(r"(?!kernbench\.)[A-Za-z_]\w*(\.\w+)*$")
_INTERACTIVE = ("<stdin>", "<ipython")
_INSTALLED = re.compile(r"(^|/)(site-packages|dist-packages|lib/python3\.\d+)/")
_TORCH_SOURCE = re.compile(r"/torch/(_\w+|nn|optim|autograd|utils|profiler|distributed|cuda|amp|jit|fx)(/|\.py$)")
# The profiler cuts the import path off file names, so that a package's own folder is all that is left.
_LIBRARIES = {"torch", "torchgen", "torchvision", "torchaudio", "functorch", "triton", "numpy", "nvtx", "tqdm"}
_ENGINE = re.compile(r"(^|/)kernbench/(?!builtin/)[\w/]+\.py$")


def table(raw: Columns, names: list[str]) -> Frames:
    """The calls in order, each with the call around it. Files are added to ``names``."""
    order = np.lexsort((-raw.end_ns, raw.start_ns, raw.thread))
    name, thread, start, end = (column[order] for column in (raw.name, raw.thread, raw.start_ns, raw.end_ns))
    known = {text: index for index, text in enumerate(names)}
    file = np.full(len(names), -1, np.int64)
    line = np.full(len(names), -1, np.int64)
    for index in np.unique(name).tolist():
        if (found := _CALL.fullmatch(names[index])) and len(found[2]) < 10:
            file[index] = known.setdefault(found[1], len(known))
            line[index] = int(found[2])
    names.extend(list(known)[len(names) :])
    return Frames(
        name=name,
        thread=thread,
        start_ns=start,
        end_ns=end,
        parent=nesting.innermost(np.ones(len(order), bool), thread, start, end),
        file=file[name],
        line=line[name],
    )


def innermost(frames: Frames, thread: Ints, time_ns: Ints) -> Ints:
    """Row of the innermost call around each time in its thread; -1 where none was open."""
    if not len(frames) or not len(time_ns):
        return np.full(len(time_ns), -1, np.int64)
    earliest = min(int(frames.start_ns.min()), int(time_ns.min()))
    span = max(int(frames.start_ns.max()), int(time_ns.max())) - earliest + 1
    # One key for thread and time; where that would overflow, times are replaced by their ranks.
    if span * (int(max(frames.thread.max(), thread.max())) + 2) < 2**62:
        begun, asked = frames.start_ns - earliest, time_ns - earliest
    else:
        ranks = np.unique(np.concatenate([frames.start_ns, time_ns]), return_inverse=True)[1]
        begun, asked = ranks[: len(frames)], ranks[len(frames) :]
        span = len(ranks) + 1
    row = np.searchsorted(frames.thread * span + begun, thread * span + asked, side="right") - 1
    row[(row >= 0) & (frames.thread[row] != thread)] = -1
    at = np.flatnonzero(row >= 0)
    while len(at):
        at = at[frames.end_ns[row[at]] <= time_ns[at]]
        row[at] = frames.parent[row[at]]
        at = at[row[at] >= 0]
    return row


def sources(
    frames: Frames, frame: Ints, host: Host, main_thread: int, names: list[str]
) -> tuple[list[SourceLine], Ints]:
    """The functions of the program that host rows ran in, and for each row which one; -1 where none is known.

    Work of a backward node belongs to the function that ran its forward operator; what else the autograd engine does
    belongs to the function that waits for it in ``main_thread``.
    """
    if not len(frames):
        return [], frame
    files = np.unique(frames.file[frames.file >= 0])
    program = np.zeros(len(names) + 1, bool)
    program[files] = [is_program(names[index]) for index in files.tolist()]
    own = _nearest(program[frames.file], frames.parent)
    row = _of(own, frame)
    engine = np.unique(host.thread[host.forward >= 0])
    lacking = np.flatnonzero((row < 0) & np.isin(host.thread, engine) & (host.forward < 0))
    waiting = np.full(len(lacking), main_thread, np.int64)
    row[lacking] = _of(own, innermost(frames, waiting, host.start_ns[lacking]))
    row = np.where(host.forward >= 0, row[host.forward], row)
    named, index = np.unique(_of(frames.name, row), return_inverse=True)
    first = {int(frames.name[at]): at for at in reversed(np.unique(row[row >= 0]).tolist())}
    lines = [_line(frames, first[name], names) for name in named.tolist() if name >= 0]
    return lines, index - (len(named) - len(lines))


def modules(frames: Frames, frame: Ints, host: Host, names: list[str], ours: bool) -> Ints:
    """Index in ``names`` of the module call around each host row; in backward, around its forward operator.

    Without Python calls the annotations that kernbench puts around modules count, if the trace is ``ours``.
    """
    if len(frames):
        is_module = np.fromiter((name.startswith(_MODULE) for name in names), bool, len(names))
        module = _of(frames.name, _of(_nearest(is_module[frames.name], frames.parent), frame))
    elif ours:
        is_path = np.fromiter((_MODULE_PATH.match(name) is not None for name in names), bool, len(names))
        # Among annotations alone, of which there are few.
        rows = np.flatnonzero(host.kind == ANNOTATION)
        around = host.annotation[rows]
        scope = _nearest(is_path[host.name[rows]], np.where(around >= 0, np.searchsorted(rows, around), -1))
        named = np.full(len(host) + 1, -1, np.int64)  # the last entry answers for row -1
        named[rows] = _of(host.name[rows], scope)
        module = named[host.annotation]
    else:
        return np.full(len(host), -1, np.int64)
    return np.where(host.forward >= 0, module[host.forward], module)


def is_program(file: str) -> bool:
    """Whether a file name of the profiler belongs to the traced program, not to Python, PyTorch or another library."""
    file = file.replace("\\", "/")
    if file.startswith("<"):
        return file.startswith(_INTERACTIVE)
    if _INSTALLED.search(file) or _TORCH_SOURCE.search(file) or _ENGINE.search(file):
        return False
    top = file.split("/", 1)[0].removesuffix(".py")
    return top not in _LIBRARIES and top not in sys.stdlib_module_names


def _line(frames: Frames, row: int, names: list[str]) -> SourceLine:
    """The definition line of a call's function; its text where a file here has that function on that line."""
    file, line = names[frames.file[row]], int(frames.line[row])
    function = names[frames.name[row]].rpartition(": ")[2]
    text = linecache.getline(file, line).strip()
    if not text.startswith("@") and not re.search(rf"\b{re.escape(function)}\b", text):
        text = ""
    return SourceLine(file=file, line=line, text=text, function=function)


def _of(column: Ints, row: Ints) -> Ints:
    """``column`` at each row; -1 for row -1."""
    return np.where(row >= 0, column[row], -1) if len(column) else np.full(len(row), -1, np.int64)


def _nearest(chosen: Bools, parent: Ints) -> Ints:
    """For each row itself or its nearest chosen ancestor, -1 without one. Parents precede their children."""
    found = np.where(chosen, np.arange(len(chosen)), -1)
    lacking = np.flatnonzero((found < 0) & (parent >= 0))
    inherited = found.tolist()
    for row, above in zip(lacking.tolist(), parent[lacking].tolist(), strict=True):
        inherited[row] = inherited[above]
    return np.array(inherited, np.int64)

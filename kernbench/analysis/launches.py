"""How many pieces of work a step gives to the device."""

from __future__ import annotations

import re

import numpy as np

from kernbench.analysis.families import NO_LAUNCH
from kernbench.nesting import OP, Bools, Ints
from kernbench.record import Launches
from kernbench.trace import COPY, KERNEL, MEMSET, Trace

# Kernels below this are as long as it takes to launch the next one.
SHORT_NS = 5_000

_OPERATOR = re.compile(r"(?!autograd::|torch::)\w+::")
_ONE_LAUNCH = re.compile(r"aten::_(foreach|fused)_")


def launches(trace: Trace) -> Launches:
    """Device work items per step, averaged over the counted steps.

    On a GPU these are kernels, copies and memsets. On a CPU they are estimated: the innermost calls of operators that
    compute something (views, allocations and metadata in ``families.NO_LAUNCH`` do not), with a ``_foreach_`` or
    ``_fused_`` operator as one. A GPU may need a few more or less: its kernels are fused differently, and the trace
    does not tell work on host tensors (an optimizer's step counters) from the rest.
    """
    steps = len(trace.counted)
    if not trace.on_gpu:
        return Launches(per_step=_computing_calls(trace) / steps)
    device = trace.device
    counted = trace.in_counted(device.step)
    count = np.bincount(device.kind[counted], minlength=3) / steps
    kernels = counted & (device.kind == KERNEL)
    length = (device.end_ns - device.start_ns)[kernels]
    return Launches(
        per_step=float(count.sum()),
        kernels_per_step=float(count[KERNEL]),
        copies_per_step=float(count[COPY]),
        memsets_per_step=float(count[MEMSET]),
        median_seconds=float(np.median(length)) / 1e9 if len(length) else None,
        short_share=float(np.mean(length < SHORT_NS)) if len(length) else None,
    )


def _computing_calls(trace: Trace) -> int:
    """Innermost computing operator calls in the counted steps."""
    host = trace.host
    launching = np.fromiter(
        (_OPERATOR.match(name) is not None and name not in NO_LAUNCH for name in trace.names), bool, len(trace.names)
    )
    whole = trace.named(_ONE_LAUNCH)
    computes = (host.kind == OP) & launching[host.name] & ~_under(host.parent, (host.kind == OP) & whole[host.name])
    # Parents precede their children, so one pass from the back carries "something computes below" all the way up.
    inner = [False] * len(host)
    marks = computes.tolist()
    parents = host.parent.tolist()
    for row in range(len(parents) - 1, -1, -1):
        if parents[row] >= 0 and (marks[row] or inner[row]):
            inner[parents[row]] = True
    leaves = computes & ~np.array(inner, bool)
    return int(np.count_nonzero(leaves & trace.in_counted(host.step)))


def _under(parent: Ints, chosen: Bools) -> Bools:
    """Rows with a chosen row among their ancestors."""
    under = np.zeros(len(parent), bool)
    for row, above in enumerate(parent.tolist()):
        under[row] = above >= 0 and (chosen[above] or under[above])
    return under

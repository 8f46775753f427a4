"""What the device still had to do when a replayed stretch began, and which of it has no launch in the trace by nature.

A trace that is recorded while work is queued holds that work, but not its launches. It is no loss: the replay takes it
as given, and the stretch's own work follows it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kernbench.traces.nesting import Bools, Ints
from kernbench.traces.trace import Trace

# A device that was idle for longer had nothing queued, so what it does next was launched later.
LONGEST_HANDOVER_NS = 50_000


@dataclass(frozen=True, eq=False)
class Earlier:
    """Device work from before the stretch that ends within it, by end. ``stream`` numbers streams as the program does.

    ``numbers`` has the number of each (device, stream), those of the stretch's own work first.
    """

    stream: Ints
    end_ns: Ints
    numbers: dict[tuple[int, int], int]

    @property
    def last_end_ns(self) -> Ints:
        """Per stream when it had finished all of it, far in the past where there is none."""
        last = np.full(len(self.numbers), -(2**60), np.int64)
        np.maximum.at(last, self.stream, self.end_ns)
        return last


def queued_before(trace: Trace) -> Bools:
    """Device rows that were queued when the recording began: without a launch, and ahead of all others of their stream.

    Once the device has run dry, nothing is left of that queue, and a missing launch is a loss.
    """
    device = trace.device
    linked = device.call >= 0
    number, numbers = _numbered(trace, np.arange(len(device)), {})
    first = np.full(len(numbers), np.iinfo(np.int64).max)
    np.minimum.at(first, number[linked], device.start_ns[linked])
    ahead = ~linked & (device.start_ns < first[number])
    begin = int(trace.host.start_ns.min()) if len(trace.host) else 0
    for one in np.unique(device.device[ahead]).tolist():
        rows = np.flatnonzero(device.device == one)
        reach = np.maximum.accumulate(device.end_ns[rows])
        since = np.append(begin, np.maximum(reach[:-1], begin))
        dry = np.flatnonzero(device.start_ns[rows] - since > LONGEST_HANDOVER_NS)
        if len(dry):
            ahead[rows[dry[0] :]] = False
    return np.asarray(ahead, np.bool_)


def streams_of(trace: Trace, issued: Ints, begin: int) -> tuple[Ints, Earlier]:
    """The number of each item's stream, from 0, and what was launched before ``begin`` and ended after it."""
    device = trace.device
    stream, numbers = _numbered(trace, issued, {})
    before = device.end_ns > begin
    before[issued] = False
    launched = trace.host.start_ns[device.call] if len(trace.host) else np.zeros(len(device), np.int64)
    before &= np.where(device.call >= 0, launched < begin, queued_before(trace) | (device.start_ns < begin))
    rows = np.flatnonzero(before)
    rows = rows[np.argsort(device.end_ns[rows], kind="stable")]
    of_rows, numbers = _numbered(trace, rows, numbers)
    return stream, Earlier(of_rows, device.end_ns[rows], numbers)


def _numbered(trace: Trace, rows: Ints, numbers: dict[tuple[int, int], int]) -> tuple[Ints, dict[tuple[int, int], int]]:
    """The number of each device row's stream, and all numbers: those given, then new ones. Each device has its own."""
    pairs = np.stack([trace.device.device[rows], trace.device.stream[rows]])
    distinct, position = np.unique(pairs, axis=1, return_inverse=True)
    known = dict(numbers)
    number = [known.setdefault((one, stream), len(known)) for one, stream in distinct.T.tolist()]
    return np.array(number, np.int64)[position.reshape(-1)], known

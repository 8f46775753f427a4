"""The words of the findings: titles, sentences with their figures, and what to do about each cause."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kernbench.analysis.alignment import Unaligned
from kernbench.analysis.readcauses import Place
from kernbench.record import Cause, Communication, Estimate, Hotspot, Launches, SourceLine

_NAME_LENGTH = 50
_SIZES = 3
# Most tiles of large products are this wide or a multiple of it: a size like that leaves no tile part empty.
_TILE = 64
_MOST_PADDING = 0.05
_SYNCHRONIZE = re.compile(r"[sS]ynchronize$")
_EXPLICIT = (
    "Take the synchronisation out, or wait for an event, and only where the result is used; for timing, measure with "
    "events and synchronise once at the end."
)
_DEFERRED = (
    "The value steers the program, so its read must be deferred, not deleted: copy it to pinned memory with "
    "non_blocking=True and decide a step later, or decide on the device (torch.where)."
)
_MEMORY = {
    "pageable": ", as from and to pageable memory it must",
    "pinned": ", which from pinned memory non_blocking=True would spare it",
    "": "",
}

TITLES: dict[Cause, str] = {
    "host read": "Host read",
    "implicit sync": "Hidden synchronisation",
    "pageable copy": "Blocking copy",
    "data loading": "Data loading",
    "launch-bound": "Launch-bound",
    "host-bound": "Host-bound",
    "allocator": "Memory allocation",
    "serialised streams": "Serialised streams",
    "unaligned product": "Unaligned product",
    "communication": "Exposed communication",
    "slow rank": "Slow rank",
    "device-bound": "Healthy",
}

ADVICE: dict[Cause, str] = {
    "host read": "Keep the value on the device, or read it every N steps: copy it to pinned memory with "
    "non_blocking=True and look at it a step later.",
    "implicit sync": "Give the result a size that does not depend on values: torch.where or masked_fill instead of a "
    "mask as an index, nonzero_static, repeat_interleave with output_size.",
    "pageable copy": "Pin the memory (DataLoader(pin_memory=True) or tensor.pin_memory()) and copy with "
    "non_blocking=True, a batch ahead of its use; build small tensors on the device.",
    "data loading": "Prepare batches ahead: more workers (num_workers, persistent_workers, prefetch_factor), cheaper "
    "transforms, or transforms on the device.",
    "launch-bound": "Launch less often: capture the step in a CUDA graph (torch.compile with mode='reduce-overhead'), "
    "fuse the short kernels, or give each launch more work.",
    "host-bound": "Take the work out of the step or do it ahead in another thread or process; a Python profiler names "
    "it where the trace has no stacks.",
    "allocator": "Keep the buffers: no torch.cuda.empty_cache() in a loop, fewer changes of shape, "
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True where memory is tight.",
    "serialised streams": "Wait later, or only for what is needed: record the event right after the work that the "
    "other stream uses, and wait for it right before the use.",
    "unaligned product": "Find the size at fault, which a trace with record_shapes=True names, and pad it to the next "
    "multiple of 64, or store the matrix with padded rows.",
    "communication": "Start it earlier and let computing hide it: larger or earlier buckets, asynchronous collectives, "
    "less data.",
    "slow rank": "Analyse the trace of that rank, and compare its data, clocks and host with the others'.",
    "device-bound": "Only faster or fewer kernels help: see the hotspots, the roofline and the fusion candidates.",
}


def duration(seconds: float) -> str:
    """Three figures with a unit that suits them."""
    for factor, unit in ((1e9, "ns"), (1e6, "µs"), (1e3, "ms")):
        if seconds * factor < 999.5:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:.0f} s"


def percent(share: float) -> str:
    """Whole percent; never "100 %" for less than all, nor "0 %" for something."""
    if 0 < share < 0.01:
        return "under 1 %"
    return "over 99 %" if 0.995 <= share < 1 else f"{share:.0%}".replace("%", " %")


def place_of(op: str, source: SourceLine | None) -> str:
    """A place as a person names it: line first, then the operator."""
    if source is None or not source.file:
        return op or "an unnamed place"
    line = f"{source.file}:{source.line}" if source.line else source.file
    text = f" `{source.text}`" if source.text else f" ({op})" if op else ""
    return line + text


def _of_step(seconds: float, step: float) -> str:
    return f"{duration(seconds)} of each step ({percent(seconds / step)})"


def read_sentence(place: Place, step: float) -> str:
    """What one place costs at which the host waits."""
    often = "" if place.count == 1 else f" {place.count:.3g} times a step"
    what = {
        "host read": f"{place_of(place.op, place.source)} makes the host wait for the device{often}",
        "implicit sync": f"{place_of(place.op, place.source)} waits for the device{often}, as the size of its result "
        "depends on values",
        "pageable copy": f"{place_of(place.op, place.source)} copies between host and device{often}, and the host "
        f"waits for it{_MEMORY[place.memory]}",
    }[place.cause]
    basis = "by the replay" if place.replayed else "by the idle time it leaves behind"
    if place.jointly:
        basis = "by the replay, once waits of other places are gone too"
    waiting = place.seconds - place.copying
    cost = duration(waiting)
    if place.replayed and place.low < 0.95 * place.seconds:
        cost = f"{duration(place.low - place.copying)} to {cost}"
    sentence = f"{what}; without the wait a step would be up to {cost} ({percent(waiting / step)}) shorter {basis}"
    if place.copying:
        sentence += f", and {_of_step(place.copying, step)} of copying could run beside kernels"
    return f"{sentence}."


def reads_sentence(found: Sequence[Place], step: float) -> str:
    """What several small places cost together; the largest is named."""
    if len(found) == 1:
        return read_sentence(found[0], step)
    together = sum(place.seconds for place in found)
    what = {
        "host read": "make the host wait for the device",
        "implicit sync": "wait for the device, as the size of their results depends on values",
        "pageable copy": "copy between host and device while the host waits",
    }[found[0].cause]
    named = place_of(found[0].op, found[0].source)
    return f"{len(found)} places {what}, for {_of_step(together, step)} together; the largest is {named}."


def of_place(place: Place) -> str:
    """What to do about one place: a value that steers the program cannot simply stay unread."""
    if place.deferred:
        return _DEFERRED
    return _EXPLICIT if _SYNCHRONIZE.search(place.op) else ADVICE[place.cause]


def host_sentence(cause: Cause, seconds: float, step: float, op: str, source: SourceLine | None, share: float) -> str:
    """What the host did while the device had nothing to do."""
    what = {
        "data loading": f"the steps wait for their next batch for {_of_step(seconds, step)}",
        "allocator": f"the device stands still for {_of_step(seconds, step)} while the host allocates or frees its "
        "memory",
        "host-bound": f"the device has nothing to do for {_of_step(seconds, step)} while the host is busy with other "
        "than launching",
    }[cause]
    named = place_of(op, source) if op or source else ""
    if not named:
        return f"{what}."
    relation = "before" if cause == "host-bound" else "in"
    return f"{what}, {percent(share)} of that {relation} {named}."


def replayed_sentence(sentence: str, estimate: Estimate, step: float) -> str:
    """The sentence with what the replay says of the change that would help."""
    low, high = estimate.saving_seconds_per_step
    cost = duration(high) if low >= 0.95 * high else f"{duration(low)} to {duration(high)}"
    return f"{sentence[:-1]}; {estimate.title} a step would be {cost} ({percent(high / step)}) shorter by the replay."


def slow_launch_sentence(seconds: float, step: float, op: str) -> str:
    """Launch calls that take as long as it takes to load a kernel."""
    return (
        f"the device waits {_of_step(seconds, step)} for launch calls that take long, most in {op or 'one operator'}, "
        "as when a kernel is loaded for the first time; trace a later step if this one was among the first."
    )


def launch_sentence(found: Launches, seconds: float, step: float) -> str:
    """A host that only launches, and is still slower than the device."""
    length = f" of {duration(found.median_seconds)} (median)" if found.median_seconds is not None else ""
    return (
        f"{found.kernels_per_step:.4g} kernels{length} a step are launched one by one more slowly than the device runs "
        f"them; it idles between them for {_of_step(seconds, step)}."
    )


def streams_sentence(streams: Sequence[int], seconds: float, step: float) -> str:
    """Streams that take turns."""
    names = ", ".join(str(number) for number in streams)
    return (
        f"work on streams {names} takes turns: events hold queued work of one back while another runs, for "
        f"{_of_step(seconds, step)} that could overlap if the work does not depend on each other."
    )


def products_sentence(found: Unaligned, step: float) -> str:
    """What products cost whose rows are not aligned; of several the costliest is named."""
    place, kernel = place_of(found.op, found.source), _ends(found.kernel)
    what = f"multiplies {' by '.join(str(list(dims)) for dims in found.operands)}" if found.operands else "multiplies"
    if found.count == 1:
        said = f"{place} {what} on a kernel for unaligned rows ({kernel})"
    else:
        said = f"{found.count:.3g} products a step run on kernels for unaligned rows"
    multiple = "are no multiples" if len(found.sizes) > 1 else "is no multiple"
    said += f", as {_listed([str(size) for size in found.sizes]) or 'some size'} {multiple} of {found.full}"
    if found.count != 1:
        said += f"; the costliest is where {place} {what} ({kernel})"
    cost = f"a step would be up to {duration(found.seconds)} ({percent(found.seconds / step)}) shorter"
    if found.compared:
        return f"{said}; at the rate of this trace's aligned products {cost}."
    own, them = ("its", "it") if found.count == 1 else ("their", "them")
    missing = "no large aligned product" if found.sizes else "no shapes"
    return f"{said}; {cost}, all of {own} time, as this trace has {missing} to compare {them} by."


def of_products(found: Unaligned) -> str:
    """What to do about sizes that keep rows from being aligned, with the numbers."""
    if not found.sizes:
        return ADVICE["unaligned product"]
    padded = _listed([_padded(size, found.full) for size in found.sizes])
    return (
        f"Pad {padded}; a vocabulary can have entries that no token uses. Or keep the size and store the matrix with "
        "padded rows."
    )


def _padded(size: int, full: int) -> str:
    """A size and what to pad it to: whole tiles unless that is far away, else aligned rows at least."""
    multiple = _TILE if -size % _TILE <= _MOST_PADDING * size else full
    return f"{size} to {size + -size % multiple} (the next multiple of {multiple})"


def _listed(parts: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    shown = [*parts[:_SIZES], *([f"{len(parts) - _SIZES} more"] if len(parts) > _SIZES else [])]
    return " and ".join(filter(None, [", ".join(shown[:-1]), *shown[-1:]]))


def _ends(name: str) -> str:
    """A CUTLASS kernel's name without what is between its generation and its alignment."""
    words = name.split("_")
    return f"{'_'.join(words[:2])}…{words[-1]}"


def rank_sentence(known: Communication, step: float) -> str:
    """The rank that the others wait for."""
    lag = known.lag_seconds_per_step or 0.0
    return f"rank {known.slowest_rank} keeps the other ranks waiting in collectives for {_of_step(lag, step)}."


def communication_sentence(seconds: float, step: float, known: Communication | None) -> str:
    """Communication that nothing else overlaps."""
    most = next(iter(known.collectives), "") if known is not None else ""
    named = f", most of it in {most}" if most else ""
    return f"communication that no computing hides takes {_of_step(seconds, step)}{named}."


def healthy_sentence(step: float, busy: float, top: Hotspot | None) -> str:
    """One line for a trace in which the device is the limit."""
    most = f"; {_short(top.name)} takes {percent(top.share)} of its time" if top is not None else ""
    return (
        f"Healthy: the device is busy {percent(busy)} of a step of {duration(step)}, so only faster kernels help{most}."
    )


def _short(name: str) -> str:
    """A kernel's name without template arguments and parameters; of a very long one the words that fit."""
    bare = name.removeprefix("void ").split("<")[0].split("(")[0].strip() or name
    if len(bare) <= _NAME_LENGTH:
        return bare
    # Libraries put words together with underscores, the kind of kernel first and its tile and stages last.
    end = max(bare.rfind("_", 0, _NAME_LENGTH + 1), bare.rfind("::", 0, _NAME_LENGTH + 1))
    return f"{bare[: end if end > _NAME_LENGTH // 2 else _NAME_LENGTH]}…"

"""JOURNAL.md: one entry per swap, and per bench that set a document's figures beside ours, appended once and never
changed. Text that people write between entries stays.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from urllib.parse import quote

from filelock import FileLock
from msgspec import Struct

from kernbench import record
from kernbench.claims import conclusion
from kernbench.errors import KernbenchError
from kernbench.record import BenchRecord, ClaimCheck, ProfileRecord, SwapRecord
from kernbench.report import units

HEADER = """# Journal

One entry per swap, written by kernbench: what was predicted, what was measured, what was decided; and one per bench
that set the figures of a document beside what exists. Entries are only added, losers stay in. Prose between entries is
welcome and is never touched; leave the `kernbench:run` lines alone, they tell which runs are entered already.
"""

MARKER = re.compile(rb"^<!-- kernbench:run (\S+) -->\s*$")
HEADING = re.compile(r"^## (?P<date>\d{4}-\d{2}-\d{2}) (?P<title>.*?)(?:: (?P<verdict>keep|reject|inconclusive))?$")
PYTHON = "python"
"""The implementation of a phase that swaps no kernel; it has no other, so its title need not say so."""

LEFTOVER = re.compile(r"[a-z0-9_]{8}")
"""What ``tempfile.mkstemp`` appends; an editor's own hidden files beside the journal look different."""


class Entry(Struct, frozen=True, kw_only=True):
    """One dated heading. ``run_id`` and ``verdict`` are empty for an entry that a person wrote."""

    date: str
    title: str
    verdict: str
    run_id: str


Entered = SwapRecord | BenchRecord


def belongs(found: record.Record) -> bool:
    """Whether a run has an entry: a decided swap, or a bench that measured what a document states a figure of."""
    if isinstance(found, SwapRecord):
        return found.verdict is not None
    return isinstance(found, BenchRecord) and any(claim.seconds is not None for claim in found.claims)


def append(path: Path, run: Entered, report: Path) -> bool:
    """Add the entry of ``run`` with a link to ``report``; False if it has its entry already.

    Raises:
        KernbenchError: the journal cannot be read or written.
    """
    return bool(_add(path, [(run, report)]))


def rebuild(path: Path, runs: Iterable[tuple[Entered, Path]]) -> list[str]:
    """Add the entries that are missing, oldest first, and touch no other; the ids of the runs added.

    Raises:
        KernbenchError: the journal cannot be read or written.
    """
    return _add(path, sorted(runs, key=lambda item: (item[0].created_utc, item[0].run_id)))


def collect(records: Iterable[Path]) -> tuple[list[tuple[Entered, Path]], list[tuple[Path, str]]]:
    """The runs with an entry among ``records`` (files of any kind of run), each with the report beside it, and what was
    skipped: damaged records and swaps without a verdict, each with the reason.
    """
    runs: list[tuple[Entered, Path]] = []
    skipped: list[tuple[Path, str]] = []
    for file in records:
        try:
            found = record.read(file)
        except record.RecordError as error:
            skipped.append((file, str(error)))
            continue
        if isinstance(found, SwapRecord | BenchRecord) and belongs(found):
            runs.append((found, file.with_name("report.html")))
        elif isinstance(found, SwapRecord):
            skipped.append((file, f"the swap is {found.status} and has no verdict"))
    return runs, skipped


def entries(path: Path) -> list[Entry]:
    """All dated entries in the order they stand; none if there is no journal.

    Raises:
        KernbenchError: the journal cannot be read.
    """
    found: list[Entry] = []
    heading: re.Match[str] | None = None
    run_id = ""
    for line in [*_read(path).splitlines(), b"## "]:
        marker = MARKER.match(line)
        if marker:
            run_id = run_id or marker[1].decode(errors="replace")
        if line.startswith(b"## "):
            if heading:
                title = _unescape(heading["title"])
                found.append(Entry(date=heading["date"], title=title, verdict=heading["verdict"] or "", run_id=run_id))
            heading = HEADING.match(line.decode(errors="replace").rstrip())
            run_id = ""
    return found


def _add(path: Path, runs: list[tuple[Entered, Path]]) -> list[str]:
    """Append the entries that are missing, all or none of them; the ids of those added."""
    path = path.resolve()
    with _exclusive(path):
        text = _read(path) or HEADER.encode()
        entered = {match[1].decode(errors="replace") for match in map(MARKER.match, text.splitlines()) if match}
        added: list[str] = []
        for run, report in runs:
            if run.run_id not in entered:
                gap = b"" if text.endswith(b"\n\n") else b"\n" if text.endswith(b"\n") else b"\n\n"
                text += gap + render(run, _link(report, path.parent)).encode()
                entered.add(run.run_id)
                added.append(run.run_id)
        if added:
            record.write_atomically(path, text)
    return added


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold the journal against other processes and clear away what a killed writer left behind."""
    lock = path.parent / ".kernbench" / "journal.lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            prefix = f".{path.name}."
            for leftover in path.parent.glob(f"{prefix}*"):
                if LEFTOVER.fullmatch(leftover.name.removeprefix(prefix)):
                    leftover.unlink()
            yield
    except OSError as error:
        raise KernbenchError(
            f"cannot write {path} ({error.strerror or error}); make it writable, then run kernbench journal --rebuild"
        ) from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise KernbenchError(f"cannot read {path} ({error.strerror or error}); make it readable") from None


def _link(report: Path, folder: Path) -> str:
    """The report's address relative to the journal, so that both move together."""
    return quote(Path(os.path.relpath(report.resolve(), folder)).as_posix())


def render(run: Entered, link: str) -> str:
    """The entry of one run as Markdown, its marker included."""
    title, body = _swap(run) if isinstance(run, SwapRecord) else _bench(run)
    return "\n".join(
        [
            f"## {run.created_utc[:10]} {title}",
            f"<!-- kernbench:run {run.run_id} -->",
            "",
            *body,
            f"- Command: {_code(run.command)}",
            f"- Report: [{run.run_id}]({link})",
            "",
        ]
    )


def _bench(bench: BenchRecord) -> tuple[str, list[str]]:
    """Title and lines of a bench: a table of what each document states, of what there is, and of what was measured."""
    first = bench.claims[0]
    names = " and ".join(dict.fromkeys(claim.kernel for claim in bench.claims))
    headings = (
        "stated", "its bandwidth", "its time", "bytes counted", "bytes there are", "too many", "bandwidth then",
        "device time here", "as called here", "bandwidth here",
    )  # fmt: skip
    lines = [
        _plain(conclusion(bench.claims)),
        "",
        f"| {' | '.join(headings)} |",
        f"|{'---|' * len(headings)}",
        *(f"| {' | '.join(_cells(claim))} |" for claim in bench.claims),
        "",
    ]
    floors = bench.environment.ceilings
    if floors and floors.launch_seconds and floors.copy_bytes_per_second:
        launching, copying = units.seconds(floors.launch_seconds), units.bytes_rate(floors.copy_bytes_per_second)
        lines.append(f"- Measured beside it: launching nothing takes {launching}, a copy moves {copying}")
    lines += [f"- Device: {_plain(_device(bench))}", f"- Commit: {_plain(_commit(bench))}"]
    return f"{_plain(names)} beside the figures of {_plain(first.source)}", lines


def _cells(claim: ClaimCheck) -> list[str]:
    rate, took, size = units.bytes_rate, units.seconds, units.moved
    return [
        _plain(claim.title).replace("|", "\\|"),
        rate(claim.bytes_per_second),
        took(claim.stated_seconds),
        size(claim.counted_bytes),
        size(claim.real_bytes),
        units.times(claim.counted_bytes / claim.real_bytes),
        rate(claim.real_bytes / claim.stated_seconds),
        took(claim.seconds) if claim.seconds else "",
        took(claim.called_seconds) if claim.called_seconds else "",
        rate(claim.real_bytes / claim.seconds) if claim.seconds else "",
    ]


def _swap(swap: SwapRecord) -> tuple[str, list[str]]:
    workload, phase, verdict = swap.workload, swap.phase, swap.verdict
    outcome = f": {verdict.decision}" if verdict else ""
    use = f" ({_plain(phase.implementation)})" if phase.implementation not in ("", PYTHON) else ""
    title = f"{_plain(workload.name)} phase {phase.number}, {_plain(phase.title)}{use}"
    facts = [
        ("Verdict", _verdict(swap)),
        ("Step time", _step_time(swap)),
        ("Other implementations", _others(swap)),
        ("Predicted", _predicted(swap)),
        ("Source document", swap.predicted.claim if swap.predicted else ""),
        ("Throughput", _throughput(swap)),
        ("Launches per step", _both(swap, lambda side: side.launches_per_step)),
        (_syncs_name(swap), _both(swap, lambda side: side.syncs_per_step)),
        ("Parity", _parity(swap)),
        ("Workload", _workload(swap)),
        ("Device", _device(swap)),
        ("Commit", _commit(swap)),
    ]
    return f"{title}{outcome}", [f"- {name}: {_plain(text)}" for name, text in facts if text]


def _verdict(swap: SwapRecord) -> str:
    if swap.verdict is None:
        return f"none, the run is {swap.status}"
    return "; ".join(part.rstrip(".") for part in (swap.verdict.sentence, *swap.verdict.reasons))


def _arm_seconds(swap: SwapRecord) -> dict[str, float]:
    """Median seconds of a step per interleaved arm; the arm of the implementation in question is "after"."""
    chosen = f"after {swap.phase.implementation}"
    medians = {arm.name: median(arm.seconds) for arm in swap.arms if arm.seconds}
    return {"after" if name == chosen else name: seconds for name, seconds in medians.items()}


def _step_time(swap: SwapRecord) -> str:
    """Medians of the interleaved arms; the ratio is paired by round, so it need not be their quotient."""
    arms = _arm_seconds(swap)
    measured = {"before", "after"} <= set(arms)
    times = f"{units.seconds(arms['before'])} → {units.seconds(arms['after'])}" if measured else ""
    ratio = swap.ratio
    if ratio is None:
        return times or "not measured"
    each = "1 step" if ratio.steps_per_round == 1 else f"{ratio.steps_per_round} steps"
    interval = f"{units.interval_name(swap.confidence)} of the ratio {units.times_range(ratio.low, ratio.high)}"
    proof = (
        f"{units.faster(ratio.median)} ({interval}, "
        f"n = {ratio.rounds} rounds of {each}, A/A floor {units.floor(ratio.noise_floor)})"
    )
    return f"{times}, {proof}" if times else proof


def _others(swap: SwapRecord) -> str:
    """Implementations that were timed beside the one in question."""
    others = {name: seconds for name, seconds in _arm_seconds(swap).items() if name.startswith("after ")}
    return ", ".join(f"{name.removeprefix('after ')} {units.seconds(seconds)}" for name, seconds in others.items())


def _predicted(swap: SwapRecord) -> str:
    if swap.predicted is None:
        return ""
    figures = [swap.predicted.text.rstrip(".")]
    low, high, replayed = swap.predicted.ratio_low, swap.predicted.ratio_high, swap.predicted.replayed
    if low is not None and high is not None and (low, high) != replayed:
        figures.append(f"ratio {units.times_range(low, high)}")
    if replayed is not None:
        figures.append(f"by the replay of the trace before {units.times_range(*replayed)}")
    if swap.predicted.syncs_per_step is not None:
        figures.append(f"{units.count(swap.predicted.syncs_per_step)} host reads fewer a step")
    if swap.predicted.launches_per_step is not None:
        figures.append(f"{units.count(swap.predicted.launches_per_step)} launches fewer a step")
    return "; ".join(figures)


def _throughput(swap: SwapRecord) -> str:
    """From the interleaved arms, like the ratio: what else ran meanwhile slowed both of them."""
    arms = _arm_seconds(swap)
    steps = swap.before.steps if swap.before else None
    if steps is None or not {"before", "after"} <= set(arms):
        return ""
    before, after = (steps.units_per_step / arms[name] for name in ("before", "after"))
    return f"{units.number(before)} → {units.units_rate(after, swap.workload.unit)}"


def _both(swap: SwapRecord, figure: Callable[[ProfileRecord], float | None]) -> str:
    before, after = (figure(side) if side else None for side in (swap.before, swap.after))
    if before is None:
        return ""
    return f"{units.count(before)} → {'not measured' if after is None else units.count(after)}"


def _syncs_name(swap: SwapRecord) -> str:
    on_gpu = swap.environment.device.type == "cuda"
    return "Syncs per step" if on_gpu else "Reads per step that would sync on a GPU"


def _parity(swap: SwapRecord) -> str:
    if not swap.parity:
        return "not checked"
    passed = sum(result.passed for result in swap.parity)
    text = f"{passed} of {len(swap.parity)} checks passed"
    mutants = [result.mutants_killed for result in swap.parity if result.mutants_killed]
    if mutants:
        text += f", {sum(killed for killed, _ in mutants)} of {sum(all_ for _, all_ in mutants)} mutants killed"
    return text


def _workload(swap: SwapRecord) -> str:
    workload = swap.workload
    data = f", data {workload.data}" if workload.data else ""
    weights = f", weights {workload.weights}" if workload.weights else ""
    return f"{workload.name}, preset {workload.preset}, {workload.dtype}, seed {workload.seed}{data}{weights}"


def _device(run: Entered) -> str:
    environment = run.environment
    triton = f", triton {environment.triton}" if environment.triton else ""
    return f"{environment.device.name}, torch {environment.torch}{triton}"


def _commit(run: Entered) -> str:
    if run.git is None:
        return "not in a git repository"
    return f"{run.git.commit[:12]}{' with uncommitted changes' if run.git.dirty else ''}"


def _plain(text: str) -> str:
    """Text of users as one line that Markdown shows as it is."""
    line = " ".join(text.split())
    return re.sub(r"([\\`*\[\]])", r"\\\1", html.escape(line, quote=False))


def _unescape(text: str) -> str:
    return html.unescape(re.sub(r"\\([\\`*\[\]])", r"\1", text))


def _code(text: str) -> str:
    """A code span around ``text``, fenced by more backticks than stand in it."""
    line = " ".join(text.split())
    fence = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    padding = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{padding}{line}{padding}{fence}"

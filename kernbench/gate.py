"""A gate for CI: one run against a baseline, with a limit on slowdown, on new host reads and on launches."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from msgspec import Struct

from kernbench import evidence, record, registry
from kernbench.analysis import idle, launches, stalls
from kernbench.errors import KernbenchError
from kernbench.measurement import statistics
from kernbench.record import AnalyzeRecord, ProfileRecord, Stall
from kernbench.report import units
from kernbench.traces import trace

MAX_SLOWDOWN = "2%"
MAX_LAUNCHES = "+0"
# Counts are means over steps, so they are exact but for the last bits of a division.
_ROUNDING = 1e-6
_NAMED = 3


class Check(Struct, frozen=True, kw_only=True):
    """One question that the gate asked: ``sentence`` holds both figures and the limit."""

    name: str
    passed: bool
    sentence: str


class Gate(Struct, frozen=True, kw_only=True):
    """What the gate decided, of which runs. ``notes`` are differences between the runs that it does not judge."""

    baseline: str
    run: str
    passed: bool
    checks: list[Check]
    notes: list[str] = []


@dataclass(frozen=True)
class Limits:
    """What may get worse. ``slowdown`` is a share; ``launches`` counts those of a step, relative if ``relative``.

    None, or false for ``new_syncs``, leaves a question out.
    """

    slowdown: float | None = None
    new_syncs: bool = False
    launches: float | None = None
    relative: bool = False


@dataclass(frozen=True)
class Side:
    """What is judged of one run. ``what`` has to agree between two runs; ``stalls`` is None where nobody watched."""

    name: str
    what: dict[str, str]
    versions: dict[str, str]
    seconds: Sequence[float]
    launches: float | None
    stalls: Sequence[Stall] | None


def limits(max_slowdown: str | None, no_new_syncs: bool, max_launches: str | None) -> Limits:
    """The limits as they are typed; with none given, all three with their defaults.

    Raises:
        KernbenchError: a limit is no percentage or count.
    """
    if max_slowdown is None and max_launches is None and not no_new_syncs:
        max_slowdown, no_new_syncs, max_launches = MAX_SLOWDOWN, True, MAX_LAUNCHES
    slowdown = _amount(max_slowdown, "--max-slowdown", r"\+?(\d+(?:\.\d+)?) ?(%)", "a percentage, as in 2%")
    allowed = _amount(
        max_launches, "--max-launches", r"\+?(\d+(?:\.\d+)?) ?(%?)", "a count or percentage, as in +0 or +5%"
    )
    return Limits(
        slowdown=slowdown[0] if slowdown else None,
        new_syncs=no_new_syncs,
        launches=allowed[0] if allowed else None,
        relative=allowed is not None and allowed[1],
    )


def _amount(text: str | None, option: str, pattern: str, expected: str) -> tuple[float, bool] | None:
    """The figure, a percentage as a share, and whether it is a percentage."""
    if text is None:
        return None
    match = re.fullmatch(pattern, text.strip())
    if match is None:
        raise KernbenchError(f"{option} {text}: give {expected}")
    percentage = match[2] == "%"
    return float(match[1]) / (100 if percentage else 1), percentage


def gate(baseline: str, run: str | None, allowed: Limits) -> Gate:
    """Judge ``run``, or the newest one like the baseline if none is named.

    Raises:
        KernbenchError: a run is missing or lacks what a limit is about, or the two cannot be compared.
    """
    before = side(baseline)
    after = side(run if run is not None else str(_newest_like(baseline)))
    for what in before.what:
        if before.what[what] != after.what.get(what):
            raise KernbenchError(
                f"the baseline {before.name} is of {what} {before.what[what] or 'unknown'}, {after.name} of "
                f"{after.what.get(what) or 'unknown'}, so no limit can be judged; name two runs of one kind"
            )
    checks = []
    if allowed.slowdown is not None:
        checks.append(_step_time(before, after, allowed.slowdown))
    if allowed.new_syncs:
        checks.append(_host_reads(before, after))
    if allowed.launches is not None:
        checks.append(_launches(before, after, allowed))
    notes = [
        f"{name} was {before.versions[name] or 'unknown'} and is {after.versions[name] or 'unknown'}"
        for name in before.versions
        if before.versions[name] != after.versions[name]
    ]
    passed = all(check.passed for check in checks)
    return Gate(baseline=before.name, run=after.name, passed=passed, checks=checks, notes=notes)


def in_words(found: Gate) -> str:
    """The decision as lines: the answer first, then each question, then what differs besides."""
    failed = [check.name for check in found.checks if not check.passed]
    answer = f"failed ({', '.join(failed)})" if failed else "passed"
    lines = [f"gate {answer}: {found.run} against the baseline {found.baseline}"]
    lines += [f"{'passed' if check.passed else 'failed'}: {check.sentence}" for check in found.checks]
    return "\n".join(lines + [f"note: {note}" for note in found.notes])


def side(reference: str) -> Side:
    """What there is to judge under a name: a profile, swap or analyze run, or a trace file.

    Raises:
        KernbenchError: there is no such run, or it holds no timed steps.
    """
    found = evidence.find(reference)
    if found.record is None and found.trace is not None:
        return _of_trace(found.name, found.trace)
    if isinstance(found.side, ProfileRecord) and found.side.steps is not None and found.side.steps.seconds:
        return _of_profile(found.name, found.side)
    if isinstance(found.side, AnalyzeRecord) and found.side.step_seconds:
        return _of_analysis(found.name, found.side)
    raise KernbenchError(f"{found.name} holds no timed steps; name a profile, swap or analyze run, or a trace")


def _of_profile(name: str, found: ProfileRecord) -> Side:
    assert found.steps is not None
    return Side(
        name=name,
        what={
            "kind": "profile",
            "workload": found.workload.name,
            "preset": found.workload.preset,
            "dtype": found.workload.dtype,
            "device": found.environment.device.name,
        },
        versions=_versions(found.environment),
        seconds=found.steps.seconds,
        launches=found.launches_per_step,
        stalls=found.stalls if found.syncs_per_step is not None else None,
    )


def _of_analysis(name: str, found: AnalyzeRecord) -> Side:
    return Side(
        name=name,
        what={"kind": "trace", "device": found.traces[0].device},
        versions={},
        seconds=found.step_seconds,
        launches=found.launches.per_step if found.launches is not None else None,
        # Without a device in the trace, nothing tells which calls would wait for one.
        stalls=found.stalls if found.idle is not None else None,
    )


def _of_trace(name: str, path: Path) -> Side:
    loaded = trace.load(path)
    loaded.check()
    windows = idle.step_windows(loaded)
    return Side(
        name=name,
        what={"kind": "trace", "device": loaded.info.device},
        versions={},
        seconds=((windows.end - windows.start) / 1e9).tolist(),
        launches=launches.launches(loaded).per_step,
        stalls=stalls.stalls(loaded, None) if loaded.on_gpu else None,
    )


def _versions(environment: record.Environment) -> dict[str, str]:
    return {"torch": environment.torch, "triton": environment.triton, "driver": environment.device.driver}


def _newest_like(baseline: str) -> Path:
    """The newest profile that the baseline can judge, if it is newer than the baseline.

    Raises:
        KernbenchError: the baseline is no profile, or there is no such run beside it.
    """
    found = evidence.find(baseline)
    if found.record is None or not isinstance(found.side, ProfileRecord):
        raise KernbenchError(f"the baseline {found.name} is of a trace, which does not tell what ran; name RUN, too")
    wanted = side(baseline).what
    workspace = registry.current()
    for path in sorted(workspace.records(), key=lambda path: path.parent.name, reverse=True):
        candidate = _readable(path)
        if not isinstance(candidate, ProfileRecord) or candidate.status != "complete" or candidate.steps is None:
            continue
        later = candidate.created_utc >= found.record.created_utc and candidate.run_id != found.record.run_id
        if later and _of_profile("", candidate).what == wanted:
            return path
    described = " ".join(wanted[key] for key in wanted if wanted[key])
    raise KernbenchError(f"there is no later {described} under {workspace.reports}; name the run to judge as RUN")


def _readable(path: Path) -> record.Record | None:
    """A record, or None for a damaged one, which ``kernbench list --runs`` shows as such."""
    try:
        return record.read(path)
    except record.RecordError:
        return None


def _step_time(before: Side, after: Side, allowed: float) -> Check:
    """A slowdown counts if it is shown, as a verdict would show it, and its best estimate is beyond the limit."""
    ratio = statistics.unpaired_ratio(before.seconds, after.seconds)
    times = f"step {units.seconds(median(before.seconds))} → {units.seconds(median(after.seconds))}"
    change = 1 / ratio.median - 1
    interval = (
        f"{statistics.CONFIDENCE * 100:.0f} % interval {_signed(1 / ratio.high - 1)} to {_signed(1 / ratio.low - 1)}"
    )
    single = min(len(before.seconds), len(after.seconds)) == 1
    known = "one step each, so no interval" if single else interval
    shown = ratio.high < 1 and abs(ratio.median - 1) > ratio.noise_floor
    limit = f"allowed {allowed:.3g} %" if (allowed := allowed * 100) else "allowed none"
    if change * 100 <= allowed:
        return Check(name="slowdown", passed=True, sentence=f"{times}, {_signed(change)} ({known}), {limit}")
    if not shown:
        doubt = "beyond the limit, but no slowdown is shown; time more steps to tell"
        return Check(name="slowdown", passed=True, sentence=f"{times}, {_signed(change)} ({known}), {limit}: {doubt}")
    return Check(name="slowdown", passed=False, sentence=f"{times}, {_signed(change)} ({known}), {limit}")


def _signed(share: float) -> str:
    return f"{share * 100:+.1f} %".replace("-", "−")


def _host_reads(before: Side, after: Side) -> Check:
    """A read is new if its function did not read with that operator as often before: lines move when code is edited."""
    old, new = _counted(before), _counted(after)
    rows, known = _waiting(after), {row.source for row in _waiting(before)}
    more = {key: count - old[key] for key, count in new.items() if count - old[key] > _ROUNDING}
    totals = f"host reads per step {units.count(sum(old.values()))} → {units.count(sum(new.values()))}"
    if not more:
        return Check(name="new syncs", passed=True, sentence=f"{totals}, none new")
    named = []
    for key, count in sorted(more.items(), key=lambda item: -item[1])[:_NAMED]:
        alike = [row for row in rows if _key(row) == key]
        row = next((row for row in alike if row.source not in known), alike[0])
        where = f"{row.file}:{row.line} {row.source}" if row.file else row.op
        named.append(f"{where} ({units.count(count)} more a step)")
    rest = f" and {len(more) - _NAMED} more" if len(more) > _NAMED else ""
    return Check(name="new syncs", passed=False, sentence=f"{totals}, new: {'; '.join(named)}{rest}")


_Key = tuple[str, str, str]


def _key(row: Stall) -> _Key:
    return row.file, row.function, row.op


def _waiting(judged: Side) -> list[Stall]:
    if judged.stalls is None:
        raise KernbenchError(
            f"{judged.name} does not tell its host reads; profile it to the end, or leave the limit out"
        )
    return [row for row in judged.stalls if row.klass != "cpu-tensor"]


def _counted(judged: Side) -> Counter[_Key]:
    count: Counter[_Key] = Counter()
    for row in _waiting(judged):
        count[_key(row)] += row.count_per_step  # type: ignore[assignment]
    return count


def _launches(before: Side, after: Side, allowed: Limits) -> Check:
    assert allowed.launches is not None
    for judged in (before, after):
        if judged.launches is None:
            raise KernbenchError(
                f"{judged.name} does not tell its launches; profile it to the end, or leave the limit out"
            )
    old, new = before.launches or 0.0, after.launches or 0.0
    most = old * (1 + allowed.launches) if allowed.relative else old + allowed.launches
    limit = f"allowed {allowed.launches * 100:g} % more" if allowed.relative else f"allowed {allowed.launches:g} more"
    change = (
        "no change"
        if abs(new - old) <= _ROUNDING
        else f"{units.count(abs(new - old))} {'more' if new > old else 'fewer'}"
    )
    return Check(
        name="launches",
        passed=new <= most + _ROUNDING,
        sentence=f"launches per step {units.count(old)} → {units.count(new)}, {change}, {limit}",
    )

"""What parity says in words: how many comparisons agree, how many planted errors were caught, what tools found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from kernbench.record import Header, ParityResult, SanitizerResult
from kernbench.report.phrases import sentence, unfinished


def parity_headline(results: Sequence[ParityResult], record: Header | None = None) -> str:
    """How many comparisons agree, and how many planted errors were caught."""
    if not results:
        return unfinished(record, "Nothing was compared") if record else "nothing was compared"
    failed = [result for result in results if not result.passed]
    killed, planted = mutants(results)
    caught = f"; {killed:,} of {planted:,} planted errors were caught" if planted else ""
    total = f"{len(results):,} comparison{'s' if len(results) != 1 else ''}"
    if not failed:
        agree = "agrees" if len(results) == 1 else "agree"
        return f"{'The' if len(results) == 1 else 'All'} {total} {agree} with {_truths(results)}{caught}."
    first = failed[0]
    where = ", ".join(part for part in (first.kernel, first.case, first.dtype, first.mode) if part)
    reason = f": {first.reason}" if first.reason else ""
    return sentence(f"{len(failed):,} of {total} failed, the first one {where}{reason}{caught}")


def _truths(results: Sequence[ParityResult]) -> str:
    """What stood for the truth, and in how many comparisons where that differs."""
    counts = Counter(result.oracle for result in results)
    named = {"float64": "the float64 oracle", "float32": "a float32 oracle", "the side before": "the side before"}
    if len(counts) == 1:
        return named[next(iter(counts))]
    return " and ".join(f"{named[oracle]} ({count:,})" for oracle, count in counts.items())


def mutants(results: Sequence[ParityResult]) -> tuple[int, int]:
    """Planted errors caught and planted, over all rows."""
    rows = [result.mutants_killed for result in results if result.mutants_killed]
    return sum(row[0] for row in rows), sum(row[1] for row in rows)


def sanitizer_clause(results: Sequence[SanitizerResult]) -> str:
    """What compute-sanitizer adds to the headline of parity; empty where it did not run."""
    if not results:
        return ""
    tools = " and ".join(dict.fromkeys(result.tool for result in results))
    failed = [result for result in results if not result.passed]
    if not failed:
        return f"{tools}: no findings in {len(results)} run{'s' if len(results) != 1 else ''}."
    first = failed[0]
    what = first.reason or next(iter(first.findings), f"{first.errors} errors")
    return sentence(f"{tools}: {len(failed)} of {len(results)} runs failed, the first one {first.kernel}: {what}")

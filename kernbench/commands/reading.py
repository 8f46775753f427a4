"""Commands that only read what is on disk, or write text: no torch is imported on their way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kernbench.commands.ending import NEGATIVE, OK, complain, progress, show, typed
from kernbench.commands.options import Json, Quiet


def list_(
    runs: Annotated[bool, typer.Option("--runs", help="List finished runs instead.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Show workloads with presets and phases, kernels with cases, and what is active."""
    from kernbench import catalogue
    from kernbench.report import console

    if runs:
        found = catalogue.runs()
        print(json.dumps(found, indent=1)) if as_json else console.show_runs(found)
    else:
        declared = catalogue.declarations()
        print(json.dumps(declared, indent=1)) if as_json else console.show_declarations(declared)
    return OK


def analyze(
    traces: Annotated[
        list[Path], typer.Argument(metavar="TRACE...", help="A torch.profiler trace; several are the ranks of one run.")
    ],
    no_html: Annotated[bool, typer.Option("--no-html", help="Keep the record alone, without a page.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Explain any Kineto trace (.json or .json.gz): what costs time, at which line, and what is won without it.

    Results go to reports/analyze/ of the workspace that the current folder is in, else of the current folder.
    """
    from kernbench.traces import decodehelper

    decodehelper.prepare(traces[0])
    from kernbench import analyze

    show(analyze.analyze(traces, typed(), progress(quiet), page=not no_html), as_json)
    return OK


def compare(
    run_a: Annotated[
        str, typer.Argument(help="The run before: a folder, a record.json, part of a run id, or a trace file.")
    ],
    run_b: Annotated[str, typer.Argument(help="The run after; a trace, if the other is one.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Set two runs or two traces side by side, with a report; exit code 1 if the second one is slower."""
    from kernbench import comparison

    outcome = comparison.compare(run_a, run_b, typed())
    show(outcome, as_json)
    return NEGATIVE if outcome.negative else OK


def query(
    run: Annotated[str, typer.Argument(help="A run folder, a record.json, part of a run id, or a trace file.")],
    sql: Annotated[
        str | None, typer.Argument(help="One SELECT; tables and columns are shown if it is left out.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Ask a run's trace in SQL: tables events, kernels, stalls and steps, times in whole nanoseconds."""
    from kernbench import query

    answer = query.query(run, sql) if sql is not None else query.schema(run)
    print(json.dumps(query.plain(answer), indent=1) if as_json else query.in_words(answer))
    return OK


def gate(
    baseline: Annotated[str, typer.Option(metavar="RUN", help="The run to hold against, named as for compare.")],
    run: Annotated[
        str | None, typer.Argument(help="The run to judge; the newest profile like the baseline if left out.")
    ] = None,
    max_slowdown: Annotated[str | None, typer.Option(metavar="SHARE", help="Longest step allowed, as in 2%.")] = None,
    no_new_syncs: Annotated[bool, typer.Option("--no-new-syncs", help="Allow no new host read.")] = False,
    max_launches: Annotated[
        str | None, typer.Option(metavar="MORE", help="Launches a step allowed beyond the baseline's, as in +0 or +5%.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """For CI: exit code 1 and the reason, if a run is worse than a baseline.

    Without any limit all three are judged: 2 % slower, no new host read, no more launches.
    """
    from kernbench import gate, record

    found = gate.gate(baseline, run, gate.limits(max_slowdown, no_new_syncs, max_launches))
    if as_json:
        print(json.dumps(record.to_builtins(found), indent=1))
    else:
        print(gate.in_words(found))
    return OK if found.passed else NEGATIVE


def report(
    run: Annotated[str, typer.Argument(help="A run folder, a record.json, or part of a run id.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Render a run's report again from its record, and the index over all runs."""
    from kernbench import reading

    show(reading.render_again(run), as_json)
    return OK


def journal(
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Add the entries that JOURNAL.md misses from the runs.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Show the journal's entries, or rebuild them from the records."""
    from kernbench import reading
    from kernbench.report import console

    entries, left_out = reading.journal_entries(rebuild=rebuild)
    for reason in left_out:
        complain(reason)
    if as_json:
        print(json.dumps(entries, indent=1))
    else:
        console.show_journal(entries)
    return OK


def init(
    folder: Annotated[Path, typer.Argument(help="Where to start a workspace.")] = Path(),
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Start a workspace: a workload, a kernel and a journal of your own, ready to run."""
    from kernbench import initialize

    created = [str(path) for path in initialize.init(folder, note=complain)]
    if as_json:
        print(json.dumps({"created": created}))
    else:
        print("\n".join(f"created {path}" for path in created) or "nothing to create: everything is there already")
        print(f"next: cd {folder} && kernbench profile ./workloads/my_model.py")
    return OK

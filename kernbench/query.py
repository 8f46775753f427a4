"""SQL over the tables of a run, by DuckDB in this process. Files and the network are out of a query's reach."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from kernbench import tables
from kernbench.errors import KernbenchError

WIDEST = 60
"""Characters to which a column of text is aligned."""


@dataclass(frozen=True)
class Answer:
    """The rows of one query, in their order, with the names of their columns."""

    columns: list[str]
    rows: list[tuple[Any, ...]]


def query(run: str | Path, sql: str) -> Answer:
    """Run one SQL statement over ``events``, ``kernels``, ``stalls`` and ``steps`` of a run or trace file.

    Raises:
        KernbenchError: there is no such run, it kept no trace, or the statement is wrong or gives no rows.
    """
    _check(sql)
    frames = tables.frames(run)
    with duckdb.connect(":memory:", config={"enable_external_access": "false"}) as connection:
        for name, frame in frames.items():
            connection.register(name, frame)
        try:
            done = connection.execute(sql)
            return Answer([column[0] for column in done.description], done.fetchall())
        except duckdb.Error as error:
            raise KernbenchError(f"{_reason(error)}; kernbench query RUN alone shows tables and columns") from None


def _check(sql: str) -> None:
    try:
        statements = duckdb.extract_statements(sql)
    except duckdb.Error as error:
        raise KernbenchError(f"{_reason(error)}; a query is one SQL statement in quotes") from None
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        given = repr(sql.strip()) if sql.strip() else "an empty text"
        raise KernbenchError(f"{given} is not one SELECT; a query reads, and is one statement")


def _reason(error: duckdb.Error) -> str:
    """What DuckDB says before it shows the statement, in one line, without tables of its own that it suggests."""
    text, _, _ = str(error).partition("\n\n")
    lines = [line.rstrip(".!? ") for line in text.splitlines() if "pg_" not in line]
    return ", ".join(lines)


def schema(run: str | Path) -> Answer:
    """The tables and columns that a query can name.

    Raises:
        KernbenchError: there is no such run, or it kept no trace.
    """
    tables.trace_of(run)
    rows = [(table, column, text) for table, columns in tables.COLUMNS.items() for column, text in columns.items()]
    return Answer(["table", "column", "holds"], rows)


def in_words(answer: Answer) -> str:
    """The answer as aligned columns, numbers to the right, one line a row; nothing is shortened.

    A longer text than ``WIDEST`` moves the rest of its own row to the right, and of no other.
    """
    cells = [[_shown(value) for value in row] for row in answer.rows]
    widths = [min(max(map(len, column)), WIDEST) for column in zip(answer.columns, *cells, strict=True)]
    right = [
        all(isinstance(row[position], int | float | type(None)) for row in answer.rows) and bool(answer.rows)
        for position in range(len(answer.columns))
    ]
    lines = [answer.columns, *cells]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def plain(answer: Answer) -> dict[str, Any]:
    """The answer as JSON can hold it: ``columns`` and ``rows``; what is no number or text becomes text."""
    return {"columns": answer.columns, "rows": [[_plain(value) for value in row] for row in answer.rows]}


def _shown(value: Any) -> str:
    text = "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    # Names come from a file of others, and a terminal obeys control characters.
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value if value is None or isinstance(value, bool | int | str) else str(value)

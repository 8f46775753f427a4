"""Remembers what was computed of a trace, for as long as the trace lives: several analyses ask for the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar
from weakref import WeakKeyDictionary

from kernbench.traces.trace import Trace

Result = TypeVar("Result")


def once_per_trace(function: Callable[[Trace], Result]) -> Callable[[Trace], Result]:
    """``function``, computed once for each trace; its results must not be changed by those who get them."""
    known: WeakKeyDictionary[Trace, Result] = WeakKeyDictionary()

    @wraps(function)
    def remembered(trace: Trace) -> Result:
        if trace not in known:
            known[trace] = function(trace)
        return known[trace]

    return remembered

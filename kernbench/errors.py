"""The errors a user sees, each with the exit code of the command line."""

from __future__ import annotations


class KernbenchError(Exception):
    """Wrong use or bad input: one clear sentence that says what to do. Exit code 2."""

    exit_code = 2
    traceback_text = ""


class WorkloadFailed(KernbenchError):  # noqa: N818 - it names what happened, not a kind of error
    """The workload's own code failed; ``traceback_text`` is its traceback, shown to the user. Exit code 3."""

    exit_code = 3

    def __init__(self, message: str, traceback_text: str = "") -> None:
        super().__init__(message)
        self.traceback_text = traceback_text

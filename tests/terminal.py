"""Runs kernbench as the terminal does, in this process."""

from typer.testing import CliRunner, Result

from kernbench.cli import app


def run(*arguments: object) -> Result:
    """Invoke ``kernbench ARGUMENTS``; its result has exit_code, stdout and stderr."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)

"""The templates of the pages, compiled once; the only module that knows Jinja.

Compiled ones are kept where Python keeps compiled modules, in ``__pycache__`` beside their sources: compiling those of
one page takes longer than filling it.
"""

from __future__ import annotations

import importlib.util
import sys
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jinja2
from jinja2.bccache import Bucket, BytecodeCache

from kernbench.record.file import write_atomically

_FOLDER = Path(__file__).with_name("templates")
_OPTIONS: dict[str, Any] = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}


class Templates:
    """Templates with these filters and global names; any other name that one uses is an error."""

    def __init__(
        self,
        filters: Mapping[str, Callable[..., Any]],
        names: Mapping[str, Any],
        cache: BytecodeCache | None = None,
    ) -> None:
        self._environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(_FOLDER),
            undefined=jinja2.StrictUndefined,
            bytecode_cache=Compiled() if cache is None else cache,
            **_OPTIONS,
        )
        self._environment.filters |= filters
        self._environment.globals |= names

    def render(self, name: str, **context: Any) -> str:
        """A template filled in."""
        return self._environment.get_template(name).render(**context)


def source(name: str) -> str:
    """A template's own text."""
    return (_FOLDER / name).read_text(encoding="utf-8")


class Compiled(BytecodeCache):
    """Compiled templates in ``__pycache__``, by Jinja's version and the options that they were compiled with.

    Jinja itself compares them with the source that they are of and with the version of Python.
    """

    def __init__(self, folder: Path = _FOLDER) -> None:
        self._folder = folder
        self._made_by = f"jinja-{jinja2.__version__}-{zlib.crc32(repr(_OPTIONS).encode()):08x}"

    def get_cache_key(self, name: str, filename: str | None = None) -> str:
        """A readable name, as templates lie in one folder."""
        return name

    def load_bytecode(self, bucket: Bucket) -> None:
        """What is not there, or cannot be read, is compiled again."""
        with suppress(OSError), self._file(bucket).open("rb") as file:
            bucket.load_bytecode(file)

    def dump_bytecode(self, bucket: Bucket) -> None:
        """As Python with its modules: nothing is written where that is not wanted or not allowed."""
        if not sys.dont_write_bytecode:
            with suppress(OSError):
                write_atomically(self._file(bucket), bucket.bytecode_to_string())

    def _file(self, bucket: Bucket) -> Path:
        # The source need not exist under this name: it tells where compiled files go, PYTHONPYCACHEPREFIX included.
        return Path(importlib.util.cache_from_source(str(self._folder / f"{bucket.key}.{self._made_by}.py")))

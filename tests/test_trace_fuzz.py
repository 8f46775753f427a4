"""Damaged traces: whatever is done to a recorded one, reading it ends in tables or in one sentence, and soon."""

import gzip
import json
import random
import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from terminal import run

from kernbench.errors import KernbenchError
from kernbench.traces import trace, tracefile

RECORDED = Path(__file__).parent / "traces" / "titan-mac-h200.json.gz"
INPUTS, BLOCKS = 300, 10
LONGEST_SECONDS = 20
"""A hundred times what such a file takes on an idle machine."""

WORDS: list[Any] = [
    None, True, -1, 0, 1e308, -1e308, 2**63, 2**64, -(2**70), 0.1, "", "0x7f", "NaN", "\ud83d", "9" * 400, [], [[]],
    {}, {"": None}, [1, [2, [3]]], "}, {", '"', "\\", "\0",
]  # fmt: skip


@cache
def recorded() -> bytes:
    return gzip.decompress(RECORDED.read_bytes())


def cut_off(random_: random.Random) -> bytes:
    return recorded()[: random_.randrange(len(recorded()))]


def cut_off_compressed(random_: random.Random) -> bytes:
    data = RECORDED.read_bytes()
    return data[: random_.randrange(2, len(data))]


def flipped(random_: random.Random) -> bytes:
    """Some bytes are others."""
    data = bytearray(recorded())
    for _ in range(random_.choice((1, 3, 30, 300))):
        data[random_.randrange(len(data))] = random_.randrange(256)
    return bytes(data)


def other_digits(random_: random.Random) -> bytes:
    """Times, correlations, threads and lengths are others; the JSON stays sound."""
    data = bytearray(recorded())
    digits = [match.start() for match in re.finditer(rb"(?<=[0-9.])[0-9]", recorded())]
    for at in random_.sample(digits, random_.choice((1, 30, 1000))):
        data[at] = random_.choice(b"0123456789")
    return bytes(data)


def flipped_compressed(random_: random.Random) -> bytes:
    data = bytearray(RECORDED.read_bytes())
    for _ in range(random_.choice((1, 3, 30))):
        data[random_.randrange(2, len(data))] = random_.randrange(256)
    return bytes(data)


def spliced(random_: random.Random) -> bytes:
    """A stretch is taken out, doubled, or moved."""
    data = recorded()
    first, second, third = sorted(random_.randrange(len(data)) for _ in range(3))
    return random_.choice(
        (
            data[:first] + data[second:],
            data[:second] + data[first:],
            data[:first] + data[second:third] + data[first:second] + data[third:],
        )
    )


def odd_values(random_: random.Random) -> bytes:
    """The JSON is sound and what it says is not."""
    document = json.loads(recorded())
    events = document["traceEvents"]
    for event in random_.sample(events, random_.choice((1, 5, 50))):
        where = random_.choice((event, event.get("args") or event))
        where[random_.choice(list(where) or ["ts"])] = random_.choice(WORDS)
    return json.dumps(document).encode()


def odd_shape(random_: random.Random) -> bytes:
    """Whole parts are missing, doubled, or something else."""
    document = json.loads(recorded())
    events = document["traceEvents"]
    key = random_.choice(list(document))
    changed: dict[int, Callable[[], Any]] = {
        0: lambda: document | {key: random_.choice(WORDS)},
        1: lambda: {name: value for name, value in document.items() if name != key},
        2: lambda: document | {"traceEvents": random_.sample(events, len(events) // 20)},
        3: lambda: document | {"traceEvents": [event for event in events if event.get("cat") != random_.choice(
            ("kernel", "cuda_runtime", "cpu_op", "user_annotation", "ac2g"))]},
        4: lambda: document | {"traceEvents": [*events, random_.choice(WORDS)]},
        5: lambda: [events, document],
        6: lambda: document | {"traceEvents": [event | {"tid": row, "ts": 0} for row, event in enumerate(events)]},
        7: lambda: document | {"traceEvents": [event | {"ts": 5, "dur": row} for row, event in enumerate(events)]},
    }  # fmt: skip
    return json.dumps(changed[random_.randrange(len(changed))]()).encode()


def odd_text(random_: random.Random) -> bytes:
    """Text that JSON does not have, where Kineto might write it."""
    data = recorded()
    matches = list(re.finditer(rb"[:,\[{}\]]", data[: 1 << 17]))
    at = random_.choice(matches).end()
    words = (
        b" nan ",
        b" inf,",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"//",
        b",",
        b'"',
        b"\0",
    )
    return data[:at] + random_.choice(words) + data[at:]


WAYS = (
    cut_off,
    cut_off_compressed,
    flipped,
    flipped_compressed,
    spliced,
    odd_values,
    odd_shape,
    odd_text,
    other_digits,
)


def damaged(number: int) -> bytes:
    """The ``number``-th damaged input, always the same."""
    data = WAYS[number % len(WAYS)](random.Random(number))
    return gzip.compress(data, 1) if number % 3 == 0 and data[:2] != b"\x1f\x8b" else data


def test_the_recorded_trace_itself_is_sound() -> None:
    loaded = trace.load(RECORDED)
    loaded.check()
    assert loaded.info.vendor == "nvidia"
    assert loaded.info.notes == [] or "Python calls" in loaded.info.notes[0]
    assert len(loaded.device) > 100


@pytest.mark.parametrize("block", range(BLOCKS))
def test_damage_ends_in_an_analysis_or_in_one_sentence(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracefile, "WINDOW", 1 << 16)  # small, so that the damage meets every state of the reader
    monkeypatch.setenv("KERNBENCH_WORKSPACE", str(tmp_path))
    refused = 0
    for number in range(block, INPUTS, BLOCKS):
        way = WAYS[number % len(WAYS)].__name__
        path = tmp_path / f"damaged{number}.json"
        path.write_bytes(damaged(number))
        began = time.monotonic()
        try:
            loaded = trace.load(path)
            loaded.check()
        except KernbenchError as error:
            refused += 1
            message = str(error)
            assert path.name in message, f"input {number} by {way}: {message}"
            assert "\n" not in message, f"input {number} by {way}: {message}"
            assert error.exit_code == 2
        else:
            assert (loaded.host.end_ns >= loaded.host.start_ns).all()
            assert run("analyze", path, "--no-html", "--quiet").exit_code == 0, f"input {number} by {way}"
        assert time.monotonic() - began < LONGEST_SECONDS, f"input {number} by {way}"
        path.unlink()
    assert refused >= INPUTS // BLOCKS // 3, "most of these are beyond reading"


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_the_command_line_refuses_with_exit_code_2(
    way: Callable[[random.Random], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERNBENCH_WORKSPACE", str(tmp_path))
    path = tmp_path / "damaged.json"
    for seed in range(40):
        path.write_bytes(way(random.Random(seed)))
        try:
            trace.load(path).check()
        except KernbenchError:
            break
    else:
        pytest.fail("none of forty was refused")
    result = run("analyze", path, "--no-html")
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert "damaged.json" in result.output.replace("\n", "")
    assert not (tmp_path / "reports").exists(), "nothing is written for a trace that cannot be read"

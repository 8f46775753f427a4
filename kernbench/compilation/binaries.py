"""Compiles a recorded launch and reads what ptxas made of it: registers, spills, shared memory, instructions."""

from __future__ import annotations

import inspect
import re
import struct
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import triton
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler.compiler import compile as compile_source

if TYPE_CHECKING:
    from kernbench.compilation.launches import Launch

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TENSOR_MEMORY_COLUMNS = 512
INSTRUCTION_BYTES = 16
PADDING_OPCODE = 0x7918
TOOL_SECONDS = 60


@dataclass(frozen=True)
class Binary:
    """What one compiled function takes: registers and spills of a thread, shared memory of a block."""

    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_memory_columns: int
    instructions: int
    seconds: float


def build(launch: Launch) -> Binary:
    """Raises whatever Triton's compiler raises."""
    started = time.perf_counter()
    compiled = compile_source(launch.source, target=launch.target, options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _tool(CUOBJDUMP, "-res-usage", cubin.name)
    found = re.search(r"REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump does not say how many registers {launch.name} takes: {usage.strip()}")
    registers, stack, local = map(int, found.groups())
    metadata = compiled.metadata
    return Binary(
        warps=metadata.num_warps,
        registers=registers,
        # A stack may also hold what a library function keeps there, so that only ptxas knows what was spilled.
        spill_bytes=_spilled(compiled.asm["ptx"], launch) if stack + local else 0,
        shared_bytes=metadata.shared,
        tensor_memory_columns=getattr(metadata, "tmem_size", None) or 0,
        instructions=instructions(compiled.asm["cubin"]),
        seconds=time.perf_counter() - started,
    )


def _spilled(ptx: str, launch: Launch) -> int:
    """Bytes a thread spills, by what ptxas says of the same code once more; the larger of its stores and loads."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target is not None
    options = (launch.options.get("ptx_options") or "").split()
    with tempfile.NamedTemporaryFile(mode="w", suffix=".ptx") as source, tempfile.NamedTemporaryFile() as output:
        source.write(ptx)
        source.flush()
        said = _tool(
            _ptxas(launch.target.arch),
            "-v",
            *options,
            f"--gpu-name={target.group(1)}",
            source.name,
            "-o",
            output.name,
        )
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    return max(map(int, spills), default=0)


def _ptxas(arch: int) -> str:
    """The assembler for an architecture; before 3.6 Triton had one for all."""
    tool = get_ptxas(arch) if inspect.signature(get_ptxas).parameters else get_ptxas()
    return str(tool.path)


def _tool(path: str | Path, *arguments: str) -> str:
    """What a tool says; raises RuntimeError where it fails."""
    done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=TOOL_SECONDS, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(path).name} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout + done.stderr


def instructions(cubin: bytes) -> int:
    """Machine instructions of all functions, without the padding behind them; 16 bytes each since capability 7.0."""
    return sum(_unpadded(code) for name, code in _sections(cubin) if name.startswith(".text."))


def _unpadded(code: bytes) -> int:
    count = len(code) // INSTRUCTION_BYTES
    while count and struct.unpack_from("<H", code, (count - 1) * INSTRUCTION_BYTES)[0] == PADDING_OPCODE:
        count -= 1
    return count


def _sections(elf: bytes) -> list[tuple[str, bytes]]:
    """Name and content of each section of a 64-bit little-endian ELF file; source: its specification, chapter 4."""
    table = struct.unpack_from("<Q", elf, 40)[0]
    size, count, names = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + index * size) for index in range(count)]
    strings = headers[names][4]
    return [
        (elf[strings + name : elf.index(b"\0", strings + name)].decode(), elf[offset : offset + length])
        for name, _, _, _, offset, length in headers
    ]


def beyond(binary: Binary) -> str:
    """What a binary takes that no architecture has, and no declaration can allow."""
    if binary.tensor_memory_columns <= TENSOR_MEMORY_COLUMNS:
        return ""
    return f"takes {binary.tensor_memory_columns} columns of tensor memory; there are {TENSOR_MEMORY_COLUMNS}"


def first_words(text: Any) -> str:
    """The first line of a compiler's message that says what is wrong."""
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"\b(error|fatal|fail\w*|invalid|unsupported)\b", line, re.I)]
    # Triton's own first line of a ptxas failure only names the exit code.
    telling = [line for line in telling if not line.startswith(("Internal Triton PTX", "`ptxas` failed"))] or telling
    return (telling or lines or [""])[0]

"""The process in which kernels are compiled: records their launches, compiles each once, and reports line by line.

It runs without TRITON_INTERPRET, and with nothing left of Triton's own launcher. ``builds`` starts it.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import torch

from kernbench import registry
from kernbench.compilation import binaries, launches
from kernbench.compilation.builds import Event, Request
from kernbench.compilation.launches import Launch, Recorder
from kernbench.compilation.uncomputed import Uncomputed
from kernbench.parity import compare, modes
from kernbench.record import Build
from kernbench.spec import Case, Inputs, KernelSpec

SEED = 0


class _Worker:
    def __init__(self, request: Request, output: Any) -> None:
        self.request = request
        self._output = output
        self._recorder = Recorder()
        self._uncomputed = Uncomputed()
        self._sending = threading.Lock()

    def send(self, event: Event) -> None:
        with self._sending:
            self._output.write(msgspec.json.encode(event) + b"\n")
            self._output.flush()

    def run(self) -> None:
        specs = [registry.kernel(wanted.kernel).declaration for wanted in self.request.wanted]
        self.send(Event(work="", done=True))
        for wanted, spec in zip(self.request.wanted, specs, strict=True):
            for dtype in wanted.dtypes:
                self._record(spec, dtype, [case for case in spec.cases if case.name in wanted.cases])
        found = [launch for launch in self._recorder.launches if launch.serves]
        names = launches.labels(found)
        kernels = [" ".join(dict.fromkeys(kernel for kernel, _ in launch.serves)) for launch in found]
        works = [f"{owner} {names[launch]} {launch.arch}" for owner, launch in zip(kernels, found, strict=True)]
        todo = [
            (f"{work} {index}", launch, names[launch])
            for index, (work, launch) in enumerate(zip(works, found, strict=True))
            if f"{work} {index}" not in self.request.skip
        ]
        with ThreadPoolExecutor(self.request.workers) as pool:
            for event in pool.map(lambda item: self._build(*item), todo):
                self.send(event)

    def _record(self, spec: KernelSpec, dtype: str, cases: list[Case]) -> None:
        """Calls the kernel for every case and architecture; a call that fails, or launches nothing, is reported."""
        failed: dict[tuple[str, str], list[str]] = {}
        cases = [case for case in cases if f"{spec.name} {dtype} {case.name}" not in self.request.skip]
        for case in cases:
            work = f"{spec.name} {dtype} {case.name}"
            rows = [_row(spec.name, "", arch, dtype, [case.name]) for arch in self.request.archs]
            self.send(Event(work=work, rows=rows))
            for arch, error in self._calls(spec, dtype, case):
                reason = f"the call raised {type(error).__name__}: {binaries.first_words(error)}{_advice(error)}"
                failed.setdefault((arch, reason), []).append(case.name)
            self.send(Event(work=work, done=True))
        launched = {launch.arch for launch in self._recorder.launches if (spec.name, dtype) in launch.serves}
        failing = {arch for arch, _ in failed}
        for arch in self.request.archs:
            if cases and arch not in launched | failing:
                failed[arch, "launches no Triton function"] = [case.name for case in cases]
        for (arch, reason), names in failed.items():
            work = f"{spec.name} {dtype} {arch} {reason}"
            if work not in self.request.skip:
                row = _row(spec.name, "", arch, dtype, names, reason=reason)
                self.send(Event(work=work, rows=[row], done=True))

    def _calls(self, spec: KernelSpec, dtype: str, case: Case) -> Iterator[tuple[str, Exception]]:
        """Calls the kernel once per architecture; those for which it raises, and what."""
        try:
            with self._uncomputed:
                inputs = spec.make_inputs(case, getattr(torch, dtype), torch.device("cpu", 0), SEED)
        except Exception as error:  # noqa: BLE001 - whatever a declaration raises is the result of building it
            yield from ((arch, error) for arch in self.request.archs)
            return
        for arch in self.request.archs:
            try:
                with self._uncomputed, self._recorder.serving(arch, spec.name, dtype, case.name):
                    _call(spec, inputs)
            except Exception as error:  # noqa: BLE001 - as above
                yield arch, error

    def _build(self, work: str, launch: Launch, label: str) -> Event:
        rows = [_row(kernel, label, launch.arch, dtype, cases) for (kernel, dtype), cases in launch.serves.items()]
        self.send(Event(work=work, rows=rows))
        try:
            with self._recorder.driver.standing_for(launch.target.arch):
                binary = binaries.build(launch)
        except Exception as error:  # noqa: BLE001 - whatever the compiler raises is the result
            place, words = launches.where(error, launch.source.fn)
            reason = f"{place}: {binaries.first_words(words)}" if place else f"{binaries.first_words(words)}"
            failed = [msgspec.structs.replace(row, reason=f"does not compile: {reason}") for row in rows]
            return Event(work=work, rows=failed, done=True)
        measured = {
            "warps": binary.warps, "registers": binary.registers, "spill_bytes": binary.spill_bytes,
            "shared_bytes": binary.shared_bytes, "instructions": binary.instructions, "seconds": binary.seconds,
        }  # fmt: skip
        reason = binaries.beyond(binary)
        built = [msgspec.structs.replace(row, passed=not reason, reason=reason, **measured) for row in rows]
        return Event(work=work, rows=built, done=True)


def _row(kernel: str, function: str, arch: str, dtype: str, cases: list[str], *, reason: str = "") -> Build:
    return Build(kernel=kernel, function=function, arch=arch, dtype=dtype, cases=cases, passed=False, reason=reason)


def _advice(error: Exception) -> str:
    if not re.search(r"\bcpu\b", str(error), re.IGNORECASE):
        return ""
    return " (kernels are called with CPU tensors to learn their launches: leave refusing those to Triton)"


def _call(spec: KernelSpec, inputs: Inputs) -> None:
    """Forward, and backward where there is one; what a backward keeps may take another launch than plain forward."""
    with torch.no_grad():
        spec.optimized(**inputs)
    if not spec.differentiable:
        return
    given = {key: leaf for name, value in inputs.items() for key, leaf in compare.leaves(value, name).items()}
    sources = [given[name].requires_grad_() for name in modes.differentiable_names(inputs, spec.mutates)]
    outputs = [
        leaf
        for leaf in compare.leaves(spec.optimized(**inputs), "output").values()
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad
    ]
    if outputs:
        torch.autograd.grad(outputs, sources, [torch.empty_like(output) for output in outputs], allow_unused=True)


def main() -> None:
    """Reads a request from standard input; what kernels print goes to standard error."""
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    _Worker(request, output).run()


if __name__ == "__main__":
    main()

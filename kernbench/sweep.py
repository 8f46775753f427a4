"""From what the user typed behind ``--sweep`` to the cases to be timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kernbench import record
from kernbench.errors import KernbenchError
from kernbench.registry import nearest
from kernbench.spec import Case, KernelSpec, Sweep
from kernbench.workload import Workload

MOST_VALUES = 50
FORMS = "give --sweep SIZE, SIZE=FROM:TO or SIZE=A,B,C, as in --sweep seeds=100:10000"


def kernels_of(workloads: Sequence[Workload], kernels: Mapping[str, KernelSpec], size: str) -> list[KernelSpec]:
    """The kernels of workloads' phases of which ``size`` can be swept, in the order of the plan; all if none can."""
    phases = [phase for workload in workloads for phase in workload.phases]
    names = dict.fromkeys(swap.kernel for phase in phases for swap in phase.swaps if swap.kernel)
    found = [kernels[name] for name in names if name in kernels]
    return [spec for spec in found if any(sweep.size == size for sweep in spec.sweeps)] or found


def size_of(text: str) -> str:
    """The name of the size that is to be swept."""
    return text.partition("=")[0].strip()


def sweepable(specs: Sequence[KernelSpec], size: str, *, named: bool) -> list[KernelSpec]:
    """Those of which this size can be swept.

    Args:
        named: the user named them, so all of them have to be.

    Raises:
        KernbenchError: there is none, or one of those named is not.
    """
    known = {sweep.size: spec for spec in specs for sweep in spec.sweeps}
    able = [spec for spec in specs if any(sweep.size == size for sweep in spec.sweeps)]
    rigid = [spec.name for spec in specs if not spec.sweeps]
    if not known:
        raise KernbenchError(
            f"--sweep: {', '.join(rigid) or 'no kernel'} declares no sizes to sweep; "
            "give the KernelSpec sweeps=(Sweep(...),)"
        )
    if not size:
        raise KernbenchError(f"--sweep names no size; {FORMS}")
    nearest(size, known, "size to sweep")
    missing = [spec.name for spec in specs if spec not in able]
    if named and missing:
        raise KernbenchError(f"--sweep {size}: {', '.join(missing)} declares no such sweep; leave it out of the names")
    return able


def cases_of_all(
    specs: Sequence[KernelSpec], text: str, *, named: bool
) -> tuple[list[tuple[KernelSpec, list[Case] | None]], list[record.Sweep]]:
    """Each kernel that can be swept as the text asks, with its cases, and the sweeps; see :func:`sweepable`."""
    kernels: list[tuple[KernelSpec, list[Case] | None]] = []
    sweeps = []
    for spec in sweepable(specs, size_of(text), named=named):
        asked, cases = cases_of(spec, text)
        kernels.append((spec, cases))
        sweeps.append(asked)
    return kernels, sweeps


def cases_of(spec: KernelSpec, text: str) -> tuple[record.Sweep, list[Case]]:
    """The sweep that a text asks for, and its cases.

    Raises:
        KernbenchError: the text is no sweep of this kernel.
    """
    size = size_of(text)
    sweep = next(sweep for sweep in spec.sweeps if sweep.size == size)
    values = _values(text, sweep)
    cases = [sweep.case(value) for value in values]
    asked = record.Sweep(
        kernel=spec.name, size=size, values=values, cases=[case.name for case in cases], fixed=sweep.fixed
    )
    return asked, cases


def _values(text: str, sweep: Sweep) -> list[int]:
    _, given, rest = text.partition("=")
    if not given:
        return list(sweep.values)
    try:
        if ":" in rest:
            low, high = (int(part) for part in rest.split(":"))
            values = sorted({low, high, *(value for value in sweep.values if low < value < high)})
        else:
            low, high = 0, 0
            values = sorted({int(part) for part in rest.split(",")})
    except ValueError:
        raise KernbenchError(f"--sweep {text}: there is a number missing or wrong; {FORMS}") from None
    if low > high:
        raise KernbenchError(f"--sweep {text}: {low} is more than {high}; give the smaller one first")
    least, most = sweep.values[0], sweep.values[-1]
    outside = [value for value in values if not least <= value <= most]
    if outside:
        raise KernbenchError(f"--sweep {text}: {sweep.size} can be swept from {least} to {most}, not to {outside[0]}")
    if len(values) < 2:
        raise KernbenchError(f"--sweep {text}: one value is no sweep; give two or more")
    if len(values) > MOST_VALUES:
        raise KernbenchError(f"--sweep {text}: {len(values)} values are more than {MOST_VALUES}; give fewer")
    return values

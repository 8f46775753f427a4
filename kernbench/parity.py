"""Parity: kernels against their reference, and phases against the workload before them, judged by a float64 oracle."""

from kernbench.kernelcheck import check_kernel
from kernbench.phasecheck import check_phase

__all__ = ["check_kernel", "check_phase"]

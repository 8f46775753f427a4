"""Parity: kernels against their reference, and phases against the workload before them, judged by a float64 oracle."""

from kernbench.kernelcheck import check_kernel

__all__ = ["check_kernel"]

"""Parity: kernels against their reference, and phases against the workload before them, judged by a float64 oracle."""

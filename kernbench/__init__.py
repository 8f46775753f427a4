"""kernbench: profile a PyTorch step, swap kernels in with proof, and write the answer down.

The package has two sides that meet in :mod:`kernbench.record`: the measuring side needs torch, the reading side
(trace, analysis, verdict, report, journal) does not. Importing :mod:`kernbench` itself imports neither.
"""

__version__ = "0.1.0"

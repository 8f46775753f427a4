"""``python -m kernbench``."""

from kernbench.cli import main

main()

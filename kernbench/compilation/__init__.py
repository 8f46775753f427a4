"""The compile matrix: every kernel built for several architectures, without a GPU."""

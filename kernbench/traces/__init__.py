"""Kineto traces: files read to columns, and joined to what analyses ask of. Needs neither torch nor triton."""

"""Measurements in child processes, so that what kills one, or never ends, costs one row of the record."""

"""How long something takes: one call, one step, several arms in turn, and what the measured roofs allow."""

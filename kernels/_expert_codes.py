"""How moves of experts and what they do to a tensor are written in numbers."""

from __future__ import annotations

import triton.language as tl

COLUMNS = tl.constexpr(4)
KIND, PARENT, CHILD, SEED = (tl.constexpr(column) for column in range(4))
"""Columns of the moves [M, 4]."""
NONE, MERGE, SPLIT, RESET = (tl.constexpr(kind) for kind in range(4))
KEPT, SHARED, ENZYME, AVERAGED = (tl.constexpr(code) for code in range(4))
"""What a merging parent takes of the child."""
COPIED, NOISY, EMPTIED, HALVED, RESTED, ERASED, TURNED = (tl.constexpr(code) for code in range(7))
"""What a child becomes."""
ENZYME_SHARE = tl.constexpr(0.9)
"""What a merging parent keeps of its enzymes."""

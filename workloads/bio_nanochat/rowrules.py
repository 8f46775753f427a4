"""The presynaptic rules by query row: R2, where each row starts from its entry of the initial state, and R3, where it
starts from what the row before left. Golden references; R3 is what the plan's recurrent kernel computes.

Both are deterministic. R3 takes its first row's start from the caller; upstream has it fixed in the kernel at
``START``. Logits above the diagonal count as none of the row's.

Shapes: B batch, H heads, Q queries and K keys (both T tokens), D head size; a row's state is [B, H].
Source: specification, section 2.4.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .presynaptic import DRIVE_LIMIT, State, amplitude, fire, rest, scores, settle
from .synapses import Synapses

START = {"calcium": 0.0, "buffer": 0.0, "pool": 0.8, "reserve": 0.2, "primed": 0.6, "energy": 0.8}


def rows_from_start(q_BHQD: Tensor, k_BHKD: Tensor, state: State, config: Synapses) -> tuple[Tensor, State]:
    """Rule R2: the bias [B, H, Q, K], ln(epsilon) above the diagonal, and the state by row."""
    rows = [
        _row(q_BHQD, k_BHKD, row, State(*(entry[:, :, row] for entry in state)), config, recurrent=False)
        for row in range(q_BHQD.shape[2])
    ]
    above = torch.log(q_BHQD.new_tensor(config.epsilon))
    return _assembled(rows, above)


def rows_in_turn(
    q_BHQD: Tensor, k_BHKD: Tensor, clamp_BHQ: Tensor, config: Synapses, carried: State | None = None
) -> tuple[Tensor, State]:
    """Rule R3: the bias [B, H, Q, K], zero above the diagonal, and the state by row.

    Args:
        clamp_BHQ: the clamp of each row, which the recurrence leaves as it is.
        carried: the state that the first row starts from, [B, H] each; its clamp is not used. ``START`` if None.
    """
    if carried is None:
        start = {name: q_BHQD.new_full(q_BHQD.shape[:2], value) for name, value in START.items()}
        carried = State(**start, clamp=clamp_BHQ[:, :, 0])
    rows = []
    for row in range(q_BHQD.shape[2]):
        bias_BHK, carried = _row(
            q_BHQD, k_BHKD, row, carried._replace(clamp=clamp_BHQ[:, :, row]), config, recurrent=True
        )
        rows.append((bias_BHK, carried))
    return _assembled(rows, q_BHQD.new_zeros(()))


def _row(
    q_BHQD: Tensor, k_BHKD: Tensor, row: int, start: State, config: Synapses, *, recurrent: bool
) -> tuple[Tensor, State]:
    """Bias over the keys up to ``row`` [B, H, row + 1], and the state after it."""
    logits_BHK = scores(q_BHQD[:, :, row : row + 1], k_BHKD[:, :, : row + 1]).squeeze(2)
    influx_BH = functional.softplus(logits_BHK.clamp(-DRIVE_LIMIT, DRIVE_LIMIT)).mean(-1)
    rested = rest(start, influx_BH, config)
    fire_BH1 = fire(rested, start.clamp, config).unsqueeze(-1)
    raw_BHK = (fire_BH1 * torch.sigmoid(logits_BHK) * rested.pool.unsqueeze(-1)).clamp(0, 1)
    sum_BH = raw_BHK.sum(-1)
    least = 0.0 if recurrent else config.epsilon
    safe_BH = torch.where(sum_BH > least, sum_BH, 1.0)
    scale_BH = torch.where(sum_BH > least, (rested.pool / safe_BH).clamp(max=1), 1.0)
    released_BHK = raw_BHK * scale_BH.unsqueeze(-1)
    used_BH = sum_BH * scale_BH if recurrent else released_BHK.sum(-1)
    after = settle(rested, start.clamp, used_BH, config)
    weight_BHK = released_BHK * amplitude(after, config).unsqueeze(-1)
    weight_BHK = weight_BHK + config.epsilon if recurrent else weight_BHK.clamp(min=config.epsilon)
    distance_K = row - torch.arange(row + 1, device=q_BHQD.device)
    tokens = q_BHQD.shape[2]
    return torch.log(weight_BHK) - distance_K.to(q_BHQD.dtype) * (config.barrier_strength / tokens), after


def _assembled(rows: list[tuple[Tensor, State]], above: Tensor) -> tuple[Tensor, State]:
    tokens = len(rows)
    padded = [
        torch.cat([bias_BHK, above.expand(*bias_BHK.shape[:2], tokens - bias_BHK.shape[2])], dim=-1)
        for bias_BHK, _ in rows
    ]
    entries = zip(*(state for _, state in rows), strict=True)
    return torch.stack(padded, dim=2), State(*(torch.stack(entry, dim=2) for entry in entries))

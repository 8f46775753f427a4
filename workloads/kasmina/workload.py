"""Kasmina seeds: a linear layer whose columns belong to seeds, in a classifier that learns to read digits.

The unswapped code is the second PyTorch layer of the source, with its Python loop and its reads. Decisions on the open
issues of the specification's section 11, and on what it leaves open:

| matter | decision |
|---|---|
| 1. uncovered columns | pass through; a chunk's width is given, so every seed but the last live one has equally many |
| 1. empty seeds (S x C above H) | count 0, mean, variance and norm 0; nothing is computed for them |
| 2. blueprint -1 | refused where seeds are germinated, placed and loaded, so that no seed ever reads with it |
| 3. error count from the score's column | read from its own |
| 4. telemetry switched off | on, of the layer's output before anything is blended in |
| 5. two copies of the state | one, which every phase reads and writes |
| 6. two lifecycle managers | one table of transitions; strategies 0 to 4 are the alpha schedules |
| "active" | training, grafting, fine-tuning, as in the PyTorch layer |
| two id tables of blend operators | the second kernel's, which uses alpha; a seed's operator is its number modulo 3 |
| blueprints | rows of the bank, differentiated through, or networks, grafted without a gradient |
| variance | of the population, as the kernels take it |
| dropout 0.1 in networks | left out: seeds together draw other numbers than one by one, and nothing could compare |
| alpha 0 handed to the schedules | they remember their own alpha, else pausing would return to 0 |
| gradient norm in the stability schedule | left out: the layer hands over four figures, and it is none of them |
| epochs in a layer with no active seed | count, else stabilizing seeds alone would wait for ever |
| fossilized seeds | pass through, as upstream, whose code for them is never reached |
| five failures | ask for CULLED, and where that may not follow, for ROLLED_BACK |
| Tamiyo | a rule: one round of requests every ten steps, judged by the training loss |
| reconstruction loss | vouched for by Tamiyo, since upstream's TRAINING trains nothing |
| document presets | the source document's sizes, in which 92 to 99.6 % of the seeds are empty; a second set |
"""

from __future__ import annotations

import functools

import torch

from kernbench.workload import Curves, Peer, Workload

from . import together
from .config import PRESETS, KasminaConfig
from .phases import PHASES
from .training import Training


def build(*, preset: KasminaConfig, device: torch.device, dtype: torch.dtype, seed: int, data: str | None) -> Training:
    """A run at ``preset``; ``data`` is a table of pixels and classes, by default scikit-learn's digits."""
    return Training(preset, device=device, dtype=dtype, seed=seed, data=data)


def compile_together(built: Training) -> None:
    """Compile the layer as phase 0 has it, and let the controller ask all seeds at once; a loop over seeds that reads
    for each one would break into as many graphs."""
    layer, tamiyo = built.model.kasmina, built.tamiyo
    layer.forward = torch.compile(functools.partial(together.forward, layer), dynamic=False)  # type: ignore[method-assign]
    tamiyo.act = functools.partial(together.act, tamiyo)  # type: ignore[method-assign]


WORKLOAD = Workload(
    name="kasmina",
    unit="images",
    summary="Kasmina seeds: a chunked layer that grafts blueprints into an MLP while it learns to read digits",
    presets=PRESETS,
    build=build,
    phases=PHASES,
    curves=Curves(
        read=lambda built: {"test accuracy": (100 * built.accuracy(), "%")},
        presets=("tiny", "tiny-schedules", "tiny-networks", "small", "medium"),
    ),
    peers=(Peer(name="torch.compile of phase 0", prepare=compile_together),),
    source="Phase 3 GPU Optimization report of 2025-01-24; layout after tachyon-beep/esperlite, morphogenetic_v2",
)

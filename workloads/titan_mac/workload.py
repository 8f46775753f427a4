"""TitanMAC: a decoder with neural memory, trained by a nested optimizer, on real text.

The unswapped code is the legacy state that the source document profiled: norms read one by one, guards as branches.
Decisions on the defects of the specification's section 8, and on what it leaves open:

| defect | decision |
|---|---|
| 1. 3,120 reads "per step" do not fit the code | not reproduced: the number of reads follows from the sizes |
| 1. AdamW reads its own counters | they live on the host, as torch keeps them: no stalls |
| 2. "SiLU into MLP" | the block MLP is exact GELU; SiLU stands in the memory MLP and the gates only |
| 3. 900 GB/s and the 100-300x claim | not used; predictions take the copy speed measured on the device |
| 4. default (1, 1, 0.5) for bad statistics | each bad norm becomes 1; the third figure stays the group's real depth |
| 5. gates and W_Q get no gradient | kept: AdamW never moves them, and alpha and eta stay near 0.5 |
| 6. memory written under a live graph | the loss is taken on copies of the weights, before the write |
| 7. attention B leaks through persistent queries | fixed: they see persistent columns only |
| 7. reset_memory misses this memory | left out: training never resets |
| 8. retain_graph in the memory update | kept; torch.compile breaks the graph there |
| 9. evaluation took 66 % of upstream wall time | no evaluation in a step |
| 10. 32 identical memory tokens | kept, wasted work included; to the mask they are ordinary sequence positions |
| legacy lr reads and `.tolist()` | one place: one `.tolist()` of both learning rates; depth is read once per group |
| parameters without gradient | their norm is read like the others', no gradient norm is read |
| meta update | one read (did the average loss fall?); it runs before the guards and trains the controller only |
| logging | five reads every 100 steps, kept in a list |
| CMS mode | presets with optimizer="cms"; only there its 12 copies of the parameters are allocated |
| CMS: average and square of each level | kept as specified, and used by nothing |
| CMS: levels due in a skipped step | stay as they are, and wait for their next turn; the host counts every call |
| CMS: order of guard and momentum | clamp, guard, then the momentum is written: a bad level keeps its own |
| CMS: a parameter without a good level | stays, weight decay included |
| CMS: what trains the network | the first 20 tensors with gradients, of each at most 4,096 elements evenly spread |
| CMS: when it is trained | before the update of every fifth call, on that step's clipped gradients |
| CMS: u_prev | the fastest momentum, which is the average of past u; a copy of its own is not kept |
| CMS: lengths in its loss | at least e^-10 an element, which is what the features resolve |
| CMS: first weights | Xavier, the output layer's a hundredth of that; rates of 0.3 and 1, as u is as long as g |
| gradient accumulation of the 168m run | left out: one batch is one step |
| data | bytes (ids below 256 for every vocabulary) in contiguous windows, resident on the device |
| causality of mac | within a segment its mean and the freshly written memory look ahead, by the dataflow itself |
"""

from __future__ import annotations

import dataclasses

import torch

from kernbench.workload import Curves, Fault, Peer, Phase, Swap, Workload

from .config import TitanConfig
from .faults import inject_nan_gradient, inject_nan_loss, protected
from .graph import NUMBER, advance, fixed_batch
from .peers import compile_loss, compile_sync_free, use_torch_fused_adamw
from .plan import PHASES
from .predictions import GRAPH_PROMISE, predict_graph
from .training import Training

SEED = TitanConfig(
    vocabulary=50257, width=512, layers=6, heads=8, feed_forward=2048, length=512, persistent=8, window=512
)
PRESETS = {
    "tiny": TitanConfig(base_lr=3e-3, weight_decay=0.01),
    "tiny-mac": TitanConfig(base_lr=3e-3, weight_decay=0.01, variant="mac"),
    "tiny-mal": TitanConfig(base_lr=3e-3, weight_decay=0.01, variant="mal", attention="block"),
    "tiny-cms": TitanConfig(base_lr=1.0, weight_decay=0.0, optimizer="cms"),
    "debug": TitanConfig(batch=2, gate_width=16, attention="block"),
    "profiler": TitanConfig(
        vocabulary=1000,
        width=256,
        layers=4,
        heads=8,
        feed_forward=1024,
        length=256,
        persistent=8,
        window=64,
        block=64,
        weight_decay=0.01,
        attention="block",
    ),
    "seed": SEED,
    "seed-cms": dataclasses.replace(SEED, base_lr=0.3, weight_decay=0.0, optimizer="cms"),
    "24gb": TitanConfig(
        vocabulary=50257,
        width=512,
        layers=8,
        heads=8,
        feed_forward=2048,
        length=1024,
        batch=16,
        persistent=8,
        window=512,
        block=64,
        memory_tokens=16,
        attention="block",
    ),
    "168m": TitanConfig(
        vocabulary=50257,
        width=1024,
        layers=9,
        heads=16,
        feed_forward=4096,
        length=1024,
        batch=8,
        persistent=16,
        window=512,
        block=64,
        gate_width=64,
        attention="block",
    ),
}


def build(*, preset: TitanConfig, device: torch.device, dtype: torch.dtype, seed: int, data: str | None) -> Training:
    """A training run at ``preset``; ``data`` is a file of text, by default Python's documentation topics."""
    return Training(preset, device=device, dtype=dtype, seed=seed, data=data)


WORKLOAD = Workload(
    name="titan-mac",
    unit="tokens",
    summary="TitanMAC training step: decoder with neural memory under a nested optimizer",
    presets=PRESETS,
    build=build,
    phases=(
        *PHASES,
        Phase(
            number=NUMBER,
            needs=(0,),
            title="CUDA graph of the step",
            flag="TITAN_GRAPH",
            predicts=GRAPH_PROMISE,
            predict=predict_graph,
            swaps=(
                Swap(site=(Training, "batch"), use=fixed_batch),
                Swap(site=(Training, "advance"), use=advance),
            ),
        ),
    ),
    peers=(
        Peer(name="torch.compile", prepare=compile_loss),
        Peer(name="torch.compile of phase 0", prepare=compile_sync_free),
        Peer(name="torch fused AdamW", prepare=use_torch_fused_adamw),
    ),
    # The loss of every step is followed without being read.
    curves=Curves(read=lambda built: {}, presets=("tiny", "tiny-mac", "tiny-mal", "tiny-cms"), reordered=3),
    faults=(
        Fault(name="nan-gradient", inject=inject_nan_gradient, protects=protected),
        Fault(name="nan-loss", inject=inject_nan_loss, protects=protected),
    ),
    source="TitanMAC-Standalone Triton kernel plan of 2025-12-20; layout after its titans_core package",
)

"""bio-nanochat: a transformer whose attention, feed-forward and experts carry synapses, trained on real text.

The unswapped code is the one that the kernel plan was written for, profile P, with profile K as a variant. Decisions on
what the specification leaves open, and on upstream's slips:

| matter | decision |
|---|---|
| docking transposed upstream | "qk" is the default, "upstream" a preset |
| rule R1 looks ahead | kept: a synapse hears all queries, so later tokens change earlier logits |
| noise on entries that no query sees | left out: it lets queries wear out keys behind them |
| noise | torch's generator, seeded by step; Philox in parity, where kernels must draw the same |
| precision | parameters and plastic state in float32 or wider, products in the working dtype, as under autocast |
| embedding cast to bfloat16 | cast to the working dtype |
| rotary tables | of the sequence's length; rounded to bfloat16 in every dtype |
| projections | start as torch starts a linear layer; nothing is said of them |
| experts' input norm | none: the block has just normalized; a dense feed-forward has its own second norm |
| experts' tensors | stacked, one tensor for all; the loop takes rows, so an unused expert has gradient zero |
| Muon and vectors | biases, norms, gains and genomes go to AdamW at the head's rate; upstream's is 0.2 |
| Muon's iteration | in the working dtype, so in bfloat16 where upstream's is |
| gradient clipping | global norm 1, as in nanochat |
| pull of the router's embeddings | zero everywhere, kept: its factors never meet |
| scores without tokens | specialisation and resilience stay as they are; upstream takes them for the best |
| several ranks | gradients are averaged, moves are the first rank's, plastic state is each rank's own |
| split, merge: step counters | stay, because a stacked tensor has one for all its experts |
| split, merge: state of a patch | "zero" as upstream, of both optimizers; "inherit" by row as the plan asks |
| Hebbian weights | bounded (``hebbian_limit``): upstream's rule is all NaN within 20 steps of the tiny size |
| seven guards of profile K | kept in the no-gradient path; which value each looks at is ours |
| no KV cache | training and prefill only; the synapses' state lasts for one call either way |
| fields that steer nothing | kept in the config, listed in ``synapses.UNREAD`` |
| native_* switches | refused: phases and their BIO_FUSED_ flags do it |
| use_flex_attention | refused: its bias is another one than rule R4's |
| vanilla model | nanochat's: also a norm of the embedding and one before the head |
| data | bytes of Python's documentation, resident on the device |
"""

from __future__ import annotations

import torch

from kernbench.errors import KernbenchError
from kernbench.workload import Curves, Peer, Phase, Swap, Workload

from .config import PRESETS, BioConfig
from .graph import NUMBER, advance, fixed_batch
from .phases import BEYOND, PHASES
from .postsynaptic import SynapticLinear, effective_compiled
from .postsynaptic_topk import TopKLinear, drive_compiled
from .predictions import GRAPH_PROMISE, SYNC_CLAIM, predict_graph
from .training import Training

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def build(*, preset: BioConfig, device: torch.device, dtype: torch.dtype, seed: int, data: str | None) -> Training:
    """A training run at ``preset``; ``data`` is a file of text, by default Python's documentation topics.

    Raises:
        KernbenchError: nothing can be trained in ``dtype``.
    """
    if dtype not in DTYPES:
        raise KernbenchError(
            f"bio-nanochat does not train in {dtype}; use --dtype float32, bfloat16, float16 or float64"
        )
    return Training(preset, device=device, dtype=dtype, seed=seed, data=data)


def draw_as_kernels_do(built: Training) -> None:
    """Make stochastic release comparable: every side draws from the Philox streams of its calls."""
    built.model.counted_noise = True


def compile_model(built: Training) -> None:
    """Compile each block, with its backward pass: a graph or two serve all, where one of the whole model takes minutes.

    The loop over experts breaks the graph at its reads. What is left of the model is three operators.
    """
    for module in built.model.modules():
        if isinstance(module, SynapticLinear):
            module.weights = effective_compiled
        elif isinstance(module, TopKLinear):
            module.drive = drive_compiled
    for block in built.model.blocks:
        block.compile(dynamic=False)


BFLOAT16 = tuple(name for name in PRESETS if name.startswith(("bench", "moe-")))

WORKLOAD = Workload(
    name="bio-nanochat",
    unit="tokens",
    summary="bio-inspired nanochat: a transformer with synapses that tire, learn, split and merge",
    presets=PRESETS,
    build=build,
    phases=(
        *PHASES,
        Phase(
            number=NUMBER,
            needs=(0,),
            title="CUDA graph of the step",
            flag="BIO_GRAPH",
            claim=SYNC_CLAIM,
            predicts=GRAPH_PROMISE,
            predict=predict_graph,
            swaps=(
                Swap(site=(Training, "batch"), use=fixed_batch),
                Swap(site=(Training, "advance"), use=advance),
            ),
        ),
        BEYOND,
    ),
    dtypes=dict.fromkeys(BFLOAT16, "bfloat16"),
    peers=(Peer(name="torch.compile", prepare=compile_model),),
    steady=draw_as_kernels_do,
    curves=Curves(read=lambda built: {}, presets=("tiny", "tiny-dense"), steps=200, every=10, reordered=3),
    source="Bio-inspired nanochat kernel plan of 2025-11-19; profiles P and K of its MIT-licensed history",
)

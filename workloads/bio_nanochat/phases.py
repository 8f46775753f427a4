"""The phases that change what a step does, with what they promise; phase 5 captures whatever of them is in place, and
:mod:`.graph` has it. :mod:`.syncfree` is phase 0, :mod:`.products` phase 6, :mod:`.fused` the kernels'.
"""

from __future__ import annotations

from kernbench.workload import Phase, Swap

from . import fused, genetics_fused, metrics, products, structure_fused, syncfree, topk
from . import predictions as promised
from .attention import Head, SynapticAttention, TopKAttention
from .moe import SynapticMoE
from .neuroscore import NeuroScore
from .optimizers import Muon
from .postsynaptic_topk import TopKLinear
from .structure import StructuralController
from .training import Training

SOME_PRESETS = 1 << 30
"""Steps between calls of a site that not every preset has: experts, or the organs of profile K."""

PHASES = (
    Phase(
        number=0,
        title="no host syncs",
        flag="BIO_SYNC_FREE",
        claim=promised.SYNC_CLAIM,
        predicts=promised.SYNC_PROMISE,
        predict=promised.predict_no_reads,
        swaps=(
            Swap(site=(Training, "step"), use=syncfree.step),
            Swap(site=(Training, "clip_gradients"), use=syncfree.clip_gradients, every=SOME_PRESETS),
            Swap(site=(SynapticMoE, "dispatch"), use=syncfree.dispatch, every=SOME_PRESETS),
            Swap(site=(SynapticMoE, "arrange"), use=syncfree.arrange, every=SOME_PRESETS),
            Swap(site=(TopKLinear, "learn"), use=syncfree.learn, every=SOME_PRESETS),
            Swap(site=(topk, "draw_counts"), use=syncfree.draw_counts, every=SOME_PRESETS),
        ),
    ),
    Phase(
        number=1,
        title="fused presynaptic attention",
        flag="BIO_FUSED_PRESYN",
        claim=promised.PRESYN_CLAIM,
        predicts=promised.PRESYN_PROMISE,
        predict=promised.predict_presyn,
        swaps=(
            Swap(site=(SynapticAttention, "attend"), kernel="presyn_attention", adapt=fused.adapt_presyn_attention),
            Swap(site=(TopKAttention, "attend"), use=fused.attend_topk, every=SOME_PRESETS),
        ),
    ),
    Phase(
        number=2,
        title="scores on the device",
        flag="BIO_FUSED_METRICS",
        claim=promised.METRICS_CLAIM,
        predicts=promised.METRICS_PROMISE,
        predict=promised.predict_metrics,
        swaps=(
            Swap(site=(SynapticMoE, "account"), kernel="router_counts", adapt=metrics.adapt_router_counts),
            Swap(site=(NeuroScore, "observe"), kernel="neuroscore_update", adapt=metrics.adapt_neuroscore_update),
            Swap(site=(NeuroScore, "report"), use=metrics.report, every=SOME_PRESETS),
        ),
    ),
    Phase(
        number=3,
        title="genes in the router",
        flag="BIO_FUSED_GENETICS",
        claim=genetics_fused.CLAIM,
        predicts=genetics_fused.PROMISE,
        predict=genetics_fused.predict,
        swaps=(
            Swap(
                site=(SynapticMoE, "route"),
                kernel="router_genetics",
                adapt=genetics_fused.adapt_router_genetics,
                every=SOME_PRESETS,
            ),
            Swap(
                site=(SynapticMoE, "metabolise"),
                kernel="metabolism_update",
                adapt=genetics_fused.adapt_metabolism_update,
                every=SOME_PRESETS,
            ),
        ),
    ),
    Phase(
        number=4,
        title="experts move on the device",
        flag="BIO_FUSED_PLASTICITY",
        claim=structure_fused.CLAIM,
        predicts=structure_fused.PROMISE,
        predict=structure_fused.predict,
        swaps=(
            Swap(
                site=(StructuralController, "decide"),
                kernel="expert_decisions",
                adapt=structure_fused.adapt_expert_decisions,
                every=SOME_PRESETS,
            ),
            Swap(
                site=(StructuralController, "apply"),
                kernel="expert_moves",
                adapt=structure_fused.adapt_expert_moves,
                every=SOME_PRESETS,
            ),
        ),
    ),
)

BEYOND = Phase(
    number=6,
    title="products that fill the device",
    flag="BIO_FULL_PRODUCTS",
    predicts=promised.PRODUCTS_PROMISE,
    predict=promised.predict_products,
    swaps=(
        Swap(site=(Head, "forward"), use=products.logits),
        Swap(site=(Muon, "move"), use=products.move_in_stacks, every=SOME_PRESETS),
    ),
)
"""Of no plan: what the profile showed once the others were in."""

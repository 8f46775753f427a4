"""What the phases put in place, with what they promise; :mod:`.syncfree` is phase 0, :mod:`.fused` the kernels'."""

from __future__ import annotations

from kernbench.workload import Phase, Swap

from . import fused, metrics, syncfree, topk
from . import predictions as promised
from .attention import SynapticAttention
from .moe import SynapticMoE
from .neuroscore import NeuroScore
from .postsynaptic_topk import TopKLinear
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
            Swap(site=(NeuroScore, "step"), kernel="neuroscore_update", adapt=metrics.adapt_neuroscore_update),
        ),
    ),
)

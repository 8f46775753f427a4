"""What the phases put in place, with what they promise; :mod:`.together` is phase 0, :mod:`.fused` the kernels'."""

from __future__ import annotations

from kernbench.workload import Phase, Swap

from . import fused, graph, together
from . import predictions as promised
from .controller import PERIOD, Tamiyo
from .layer import KasminaLayer
from .training import Training

PHASES = (
    Phase(
        number=0,
        title="all seeds at once",
        flag="KASMINA_TOGETHER",
        claim=promised.SYNC_CLAIM,
        predicts=promised.SYNC_PROMISE,
        predict=promised.predict_no_reads,
        swaps=(
            Swap(site=(KasminaLayer, "forward"), use=together.forward),
            Swap(site=(Tamiyo, "act"), use=together.act, every=PERIOD),
        ),
    ),
    Phase(
        number=1,
        title="blend with telemetry",
        flag="KASMINA_FUSED_BLEND",
        claim=promised.BLEND_CLAIM,
        predicts=promised.BLEND_PROMISE,
        predict=promised.predict_blend,
        swaps=(Swap(site=(together, "blend"), kernel="seed_blend", adapt=fused.adapt_blend),),
    ),
    Phase(
        number=2,
        title="batched state update",
        flag="KASMINA_BATCHED_STATE",
        claim=promised.MOVE_CLAIM,
        predicts=promised.MOVE_PROMISE,
        predict=promised.predict_move,
        swaps=(Swap(site=(together, "move"), kernel="seed_state_update", adapt=fused.adapt_move),),
    ),
    Phase(
        number=3,
        title="telemetry from tiles",
        flag="KASMINA_FUSED_TELEMETRY",
        claim=promised.MEASURE_CLAIM,
        predicts=promised.MEASURE_PROMISE,
        predict=promised.predict_measure,
        swaps=(Swap(site=(together, "measure"), kernel="seed_telemetry", adapt=fused.adapt_measure),),
    ),
    Phase(
        number=4,
        needs=(0,),
        title="CUDA graph of the step",
        flag="KASMINA_GRAPH",
        claim=promised.GRAPH_CLAIM,
        predicts=promised.GRAPH_PROMISE,
        predict=promised.predict_graph,
        swaps=(Swap(site=(Training, "run_batch"), use=graph.run_batch),),
    ),
    Phase(
        number=5,
        title="bookkeeping of seeds",
        flag="KASMINA_FUSED_BOOKKEEPING",
        claim=promised.BOOKKEEPING_CLAIM,
        predicts=promised.BOOKKEEPING_PROMISE,
        predict=promised.predict_bookkeeping,
        swaps=(
            Swap(site=(together, "alphas"), kernel="seed_alpha", adapt=fused.adapt_alphas),
            Swap(site=(together, "finish"), kernel="seed_record", adapt=fused.adapt_finish),
        ),
    ),
)

"""What the phases put in place, with what they promise; the work of phase 0 is in :mod:`.together`."""

from __future__ import annotations

from kernbench.workload import Phase, Swap

from . import together
from .controller import PERIOD, Tamiyo
from .layer import KasminaLayer
from .predictions import SYNC_CLAIM, SYNC_PROMISE, predict_no_reads

PHASES = (
    Phase(
        number=0,
        title="all seeds at once",
        flag="KASMINA_TOGETHER",
        claim=SYNC_CLAIM,
        predicts=SYNC_PROMISE,
        predict=predict_no_reads,
        swaps=(
            Swap(site=(KasminaLayer, "forward"), use=together.forward),
            Swap(site=(Tamiyo, "act"), use=together.act, every=PERIOD),
        ),
    ),
)

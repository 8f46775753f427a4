"""The phases that change what a step does; phase 6 captures whatever of them is in place, and :mod:`.graph` has it."""

from __future__ import annotations

from kernbench.workload import Phase, Swap

from .cms import Momenta
from .config import TitanConfig
from .fused_memory import (
    LOSS_CLAIM,
    LOSS_PROMISE,
    UPDATE_CLAIM,
    UPDATE_PROMISE,
    adapt_memory_loss,
    adapt_memory_update,
    gradient_taken,
    predict_memory_loss,
    predict_memory_update,
)
from .fused_norm_linear import (
    NORM_LINEAR_CLAIM,
    NORM_LINEAR_PROMISE,
    adapt_hidden,
    adapt_qkv,
    predict_fused_norm_linear,
)
from .memory import NeuralMemory
from .model import Block
from .optimizer import DeepNestedOptimizer, LearningRateController
from .phases import (
    adapt_fused_adamw,
    adapt_fused_cms,
    control,
    group_statistics,
    meta_update,
    move_parameters,
    step_optimizer,
    step_training,
    update_memory,
)
from .predictions import (
    ADAMW_CLAIM,
    ADAMW_PROMISE,
    CMS_PROMISE,
    SYNC_CLAIM,
    SYNC_PROMISE,
    predict_fused_adamw,
    predict_fused_cms,
    predict_no_syncs,
)
from .training import Training

PHASES = (
    Phase(
        number=0,
        title="no host syncs",
        flag="TITAN_SYNC_FREE",
        claim=SYNC_CLAIM,
        predicts=SYNC_PROMISE,
        predict=predict_no_syncs,
        swaps=(
            Swap(site=(NeuralMemory, "update"), use=update_memory),
            Swap(site=(LearningRateController, "forward"), use=control),
            Swap(site=(DeepNestedOptimizer, "group_statistics"), use=group_statistics),
            Swap(site=(DeepNestedOptimizer, "step"), use=step_optimizer),
            Swap(site=(DeepNestedOptimizer, "meta_update"), use=meta_update, every=TitanConfig.meta_update_freq),
            Swap(site=(Training, "step"), use=step_training),
        ),
    ),
    Phase(
        number=1,
        title="memory update without autograd",
        flag="TITAN_FUSED_MEMORY_UPDATE",
        claim=UPDATE_CLAIM,
        predicts=UPDATE_PROMISE,
        predict=predict_memory_update,
        swaps=(Swap(site=(NeuralMemory, "learn"), kernel="memory_mlp_update", adapt=adapt_memory_update),),
    ),
    Phase(
        number=2,
        title="fused AdamW",
        flag="TITAN_FUSED_ADAMW",
        claim=ADAMW_CLAIM,
        predicts=ADAMW_PROMISE,
        predict=predict_fused_adamw,
        swaps=(Swap(site=(DeepNestedOptimizer, "apply_update"), kernel="fused_adamw", adapt=adapt_fused_adamw),),
    ),
    Phase(
        number=3,
        title="memory forward and loss",
        flag="TITAN_FUSED_MEMORY_LOSS",
        claim=LOSS_CLAIM,
        predicts=LOSS_PROMISE,
        predict=predict_memory_loss,
        swaps=(
            Swap(site=(NeuralMemory, "reconstruction_loss"), kernel="memory_mlp_loss", adapt=adapt_memory_loss),
            Swap(site=(NeuralMemory, "gradient"), use=gradient_taken),
        ),
    ),
    Phase(
        number=4,
        title="fused norm and linear",
        flag="TITAN_FUSED_NORM_LINEAR",
        claim=NORM_LINEAR_CLAIM,
        predicts=NORM_LINEAR_PROMISE,
        predict=predict_fused_norm_linear,
        swaps=(
            Swap(site=(Block, "qkv"), kernel="rms_norm_linear", adapt=adapt_qkv),
            Swap(site=(Block, "hidden"), kernel="rms_norm_linear", adapt=adapt_hidden),
        ),
    ),
    Phase(
        number=5,
        title="fused CMS",
        flag="TITAN_FUSED_CMS",
        predicts=CMS_PROMISE,
        predict=predict_fused_cms,
        swaps=(
            Swap(site=(DeepNestedOptimizer, "move_parameters"), use=move_parameters),
            Swap(site=(Momenta, "update"), kernel="fused_cms", adapt=adapt_fused_cms),
        ),
    ),
)

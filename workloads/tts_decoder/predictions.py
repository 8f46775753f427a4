"""What the phases promise, in figures, from the profile of the side before."""

from __future__ import annotations

from kernbench.promises import Bound, promise, step_seconds, without_idle, without_waits
from kernbench.record import Prediction, ProfileRecord

from .config import PRESETS, TtsConfig

SYNC_CLAIM = "Rust, optimizations 1 to 6: 17.9 to 19.4 frames/s on 1.7B (medium text), 18 reads a frame to 1"
SYNC_PROMISE = "No host read is left in a steady frame; the gain is the time the device idled behind them, at most."
NORM_CLAIM = "15-25 % speedup; 66 of about 700 launches a frame, counting 33 norms"
NORM_PROMISE = (
    "Two launches a layer for both norms and both residual sums, over all 16 passes of a frame; while launches bound "
    "the frame, each one saved is worth an average one."
)
SWIGLU_CLAIM = "5-10 % speedup; 33 of about 634 launches a frame"
SWIGLU_PROMISE = "One launch for silu and product in each of a frame's layer passes; worth that share of the launches."
ROPE_CLAIM = "2-5 % speedup; 56 of about 601 launches a frame"
ROPE_PROMISE = (
    "One launch for both norms, rotation, tables and cache write of a layer; the cache is allocated once and no longer "
    "copied to grow."
)
GRAPH_PROMISE = "One launch a frame: the device no longer waits for the host; at best its busy time is left."
ONE_ROW_PROMISE = (
    "Five operators a layer, each one launch, read the weights once at copy speed; at best the bandwidth floor is left."
)
CHOICES_PROMISE = (
    "One launch chooses an acoustic code, writes it down, looks its embedding up and adds it, and one does all of a "
    "semantic token's sampling; each launch saved is worth an average one, at best."
)

# Of RMSNorm.forward: square, mean, eps, root, two products, and where the dtype is short two casts.
NORM_LAUNCHES = 6
CASTS = 2
# In frames that follow fixed codes, as timed ones do: of an acoustic code argmax, the look for the fixed one, embedding
# and sum become one; those of a frame are no longer put together and written; 30 of a token become one.
SAVED_PER_CODE = 3
SAVED_BY_KEEPING = 2
SAVED_PER_TOKEN = 29


def predict_no_syncs(before: ProfileRecord) -> Prediction:
    """All syncs go; the frame loses at most the device idle time that has a sync as its cause."""
    return promise(SYNC_PROMISE, without_waits(before), claim=SYNC_CLAIM, syncs=before.syncs_per_step)


def predict_fused_norm(before: ProfileRecord) -> Prediction:
    """Both norms and sums of a layer become two launches, the final norm is one of them."""
    config = PRESETS.get(before.workload.preset)
    if config is None:
        bound = Bound(None, "a preset of other sizes, so no launches are promised")
        return promise(NORM_PROMISE, bound, claim=NORM_CLAIM)
    norm = NORM_LAUNCHES + (CASTS if before.workload.dtype in ("bfloat16", "float16") else 0)
    layers, passes = layer_passes(config), config.groups
    saved = layers * (2 * norm + 2) + passes * norm - (2 * layers + passes)
    return _launches(before, saved, NORM_PROMISE, NORM_CLAIM)


def predict_fused_swiglu(before: ProfileRecord) -> Prediction:
    """Two launches become one in each layer pass."""
    return _launches(before, _saved_at_site(before, 2), SWIGLU_PROMISE, SWIGLU_CLAIM)


def predict_fused_rope(before: ProfileRecord) -> Prediction:
    """All launches at the site become one in each layer pass."""
    return _launches(before, _saved_at_site(before, 3), ROPE_PROMISE, ROPE_CLAIM)


def predict_graph(before: ProfileRecord) -> Prediction:
    """All idle time goes, at best."""
    return promise(GRAPH_PROMISE, without_idle(before))


def predict_one_row(before: ProfileRecord) -> Prediction:
    """What is left is the time that the frame's bytes take, at best."""
    step, bound = step_seconds(before), Bound(None, "no measured copy speed, or one that does not bind")
    floor = before.floor.seconds if before.floor else None
    if step and floor and before.floor and before.floor.share is not None and floor < step:
        bound = Bound(
            step / floor,
            f"frame {step * 1e3:.3g} ms; its {before.floor.bytes_per_step / 1e9:.3g} GB take {floor * 1e3:.3g} ms at "
            "the measured copy speed",
        )
    return promise(ONE_ROW_PROMISE, bound)


def predict_choices(before: ProfileRecord) -> Prediction:
    """What is left of choosing a code, and of keeping those of a frame, is a launch a code."""
    config = PRESETS.get(before.workload.preset)
    saved = None
    if config is not None:
        # A short dtype is widened before the token is chosen.
        token = SAVED_PER_TOKEN + (before.workload.dtype in ("bfloat16", "float16"))
        saved = (config.groups - 1) * SAVED_PER_CODE + SAVED_BY_KEEPING + token
    return _launches(before, saved, CHOICES_PROMISE, "")


def layer_passes(config: TtsConfig) -> int:
    """Layers that run in a frame: the talker's once, the predictor's for each acoustic code."""
    return config.talker.layers + (config.groups - 1) * config.predictor.layers


def _saved_at_site(before: ProfileRecord, number: int) -> float | None:
    """Launches inside the phase's site less the one that replaces them; None without a GPU or a known preset."""
    config = PRESETS.get(before.workload.preset)
    # On the CPU hotspots are operators, which call each other: their calls are not launches.
    if config is None or before.environment.device.type != "cuda":
        return None
    calls = sum(spot.calls_per_step for spot in before.hotspots if spot.phase == number)
    return calls - layer_passes(config) if calls else None


def _launches(before: ProfileRecord, saved: float | None, text: str, claim: str) -> Prediction:
    """A frame that is bound by launches gets shorter by the average launch for each one saved."""
    step, total = step_seconds(before), before.launches_per_step
    if saved is None or not step or not total or not 0 < saved < total:
        bound = Bound(None, "launches at this site are counted on a GPU only")
    else:
        bound = Bound(
            total / (total - saved), f"{saved:.0f} of {total:.0f} launches, in a frame of {step * 1e3:.3g} ms"
        )
    return promise(text, bound, claim=claim, launches=saved)

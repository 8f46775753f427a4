"""The phases of the TTS decoder: the same codes as the baseline, with less to wait for and less to launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_tts_decoder import decoder, module, small, stepped, workload
from torch.utils._python_dispatch import TorchDispatchMode

from kernbench import device, experiment, registry, swap
from kernbench.errors import KernbenchError
from kernbench.measurement.measure import Settings, watch
from kernbench.record import Ceilings, Device, Environment, Hotspot, Idle, ProfileRecord, Steps, WorkloadInfo

FRAMES = 10
NUMBERS = tuple(phase.number for phase in workload().phases)
CUMULATIVE = [NUMBERS[: count + 1] for count in range(len(NUMBERS))]
# Of those, what differs in how it counts positions, keeps the cache and chooses codes.
LOOPS = [CUMULATIVE[0], *CUMULATIVE[3:]]


def plan(*numbers: int, use: str = "eager") -> swap.Plan:
    """The phases of these numbers; kernels by their references unless said otherwise."""
    chosen = dict.fromkeys(numbers, use)
    return swap.plan(workload(), numbers, use=chosen, kernels=lambda name: registry.kernel(name).declaration)


def spoken(built: Any, numbers: tuple[int, ...], frames: int = FRAMES, use: str = "eager") -> list[list[int]]:
    with plan(*numbers, use=use).applied(built):
        return stepped(built, frames)


@pytest.mark.parametrize("numbers", [*CUMULATIVE, (3,), (0, 6), (0, 3, 4)], ids=str)
@pytest.mark.parametrize("acoustic_temperature", [0.0, 0.9])
def test_phases_speak_the_baselines_codes(numbers: tuple[int, ...], acoustic_temperature: float) -> None:
    config = small(acoustic_temperature=acoustic_temperature)
    before, after = decoder(config), decoder(config)
    assert spoken(after, numbers) == spoken(before, ())
    assert torch.allclose(after.logits_1V, before.logits_1V, atol=1e-5)
    for kind in ("talker_keys", "talker_values", "acoustic_logits"):
        for own, other in zip(after.state_dict()[kind], before.state_dict()[kind], strict=True):
            assert own.shape == other.shape
            assert torch.allclose(own, other, atol=1e-5), kind


def test_sync_free_sampling_changes_no_bit() -> None:
    before, after = decoder(), decoder()
    assert spoken(after, (0,)) == spoken(before, ())
    assert torch.equal(after.logits_1V, before.logits_1V)


def test_triton_kernels_speak_the_baselines_codes() -> None:
    """One frame, because the interpreter takes its time."""
    before, after = decoder(), decoder()
    assert spoken(after, NUMBERS, 1, use="triton") == spoken(before, (), 1)
    assert torch.allclose(after.logits_1V, before.logits_1V, atol=1e-4)


@pytest.mark.parametrize("numbers", LOOPS, ids=str)
def test_going_back_in_an_utterance(numbers: tuple[int, ...]) -> None:
    once = spoken(decoder(), numbers, 8)
    built = decoder()
    with plan(*numbers).applied(built):
        stepped(built, 6)
        for index in (4, 5, 2, 7):
            built.step(index)
        assert built.read_codes() == once


@pytest.mark.parametrize("numbers", LOOPS, ids=str)
def test_a_full_cache_begins_again(numbers: tuple[int, ...]) -> None:
    built = decoder()
    frames = built.config.frames
    with plan(*numbers).applied(built):
        once = stepped(built, frames)
        for index in range(frames, frames + 3):
            built.step(index)
        assert built.read_codes() == once[:3]


@pytest.mark.parametrize("numbers", LOOPS, ids=str)
def test_phases_can_go_in_and_out_between_steps(numbers: tuple[int, ...]) -> None:
    """The cache follows from concatenation into its room and back."""
    expected, built = decoder(), decoder()
    stepped(expected, 9)
    for index in range(9):
        if index // 3 == 1:
            with plan(*numbers).applied(built):
                built.step(index)
        else:
            built.step(index)
    assert torch.equal(built.codes_MG, expected.codes_MG)
    assert torch.allclose(built.logits_1V, expected.logits_1V, atol=1e-5)


@pytest.mark.parametrize("numbers", LOOPS, ids=str)
def test_speech_ends_at_the_same_frame(numbers: tuple[int, ...]) -> None:
    config = small(end_after=2)
    codes = decoder(config).generate(20)
    first = next(index for index in range(3, 20) if codes[index][0] not in [frame[0] for frame in codes[:index]])
    built = decoder(config)
    built.end_token = codes[first][0]
    with plan(*numbers).applied(built):
        assert built.generate(20) == codes[:first]
        assert built.generate(first - 1) == codes[: first - 1]


@pytest.mark.parametrize("numbers", LOOPS, ids=str)
def test_forced_codes_are_followed(numbers: tuple[int, ...]) -> None:
    forced = torch.randint(0, 200, (49, 4), generator=torch.Generator().manual_seed(1))
    before, after = decoder(), decoder()
    for built in (before, after):
        built.force(forced)
    with plan(*numbers).applied(after):
        stepped(after, 6)
    stepped(before, 6)
    assert torch.equal(after.codes_MG[:, 1:], before.codes_MG[:, 1:])
    assert torch.equal(after.codes_MG[16:22], forced[16:22])
    assert torch.allclose(after.logits_1V, before.logits_1V, atol=1e-5)


def reads(preset: str, numbers: tuple[int, ...]) -> list[tuple[str, int]]:
    """Form and line of each read of a steady step that would make a GPU wait."""
    settings = Settings(
        workload=workload(),
        preset=preset,
        device=device.resolve("cpu"),
        dtype=torch.float32,
        seed=0,
        data=None,
        steps=1,
    )
    log = watch(settings, plan(*numbers))
    return [(read.form, read.line) for read in log.reads if not read.host_tensor]


def test_reads_of_the_baseline() -> None:
    """A frame reads each acoustic code, the logits, the ids so far and the token, and copies the token back."""
    forms = [form for form, _ in reads("tiny", ())]
    assert len(forms) % 2 == 0
    assert sorted(forms[: len(forms) // 2]) == sorted(["int"] * 3 + ["copy", "tolist", "copy", "int"])


@pytest.mark.parametrize("numbers", LOOPS, ids=str)
def test_sync_free_sampling_reads_nothing(numbers: tuple[int, ...]) -> None:
    assert reads("tiny", numbers) == []


def test_the_graph_needs_the_phases_that_make_it_possible() -> None:
    for numbers in ((4,), (0, 4), (3, 4)):
        with pytest.raises(KernbenchError, match="keep (it|them) first, or name all: swap --phase 4 --phases 0,3, "):
            plan(*numbers)


def test_without_a_gpu_the_graph_says_that_it_is_none() -> None:
    spoken(decoder(), (0, 3, 4), 1)
    assert device.WARNINGS.count(module("graph").UNCAPTURED) == 1


def test_phase_6_needs_the_phase_that_reads_its_codes() -> None:
    with pytest.raises(KernbenchError, match="phase 6 of tts-decoder needs phase 0 in place"):
        plan(6)


def test_sampled_acoustic_codes_are_left_to_phase_0_aloud() -> None:
    spoken(decoder(small(acoustic_temperature=0.9)), (0, 6), 1)
    assert device.WARNINGS.count(module("choices").SAMPLED) == 1


def test_a_preallocated_cache_stays_where_it_is() -> None:
    built = decoder()
    with plan(0, 3).applied(built):
        built.step(0)
        addresses = [keys.data_ptr() for keys in built.talker_cache.content()[0]]
        stepped(built, 4)
        assert [keys.data_ptr() for keys in built.talker_cache.content()[0]] == addresses
    built.step(4)
    assert [keys.data_ptr() for keys in built.talker_cache.content()[0]] != addresses


def test_calls_while_a_graph_is_captured_show_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a captured frame consists of runs once in Python, and then never again."""
    planned, built = plan(0), decoder()
    with planned.applied(built):
        monkeypatch.setattr(swap, "_is_capturing", lambda: True)
        built.step(0)
        monkeypatch.setattr(swap, "_is_capturing", lambda: False)
    hits = {hit.site: hit.calls for hit in planned.receipt().hits(5)}
    assert hits["Decoder.acoustic_code"] == 3
    assert hits["Decoder.ended"] == 1


def test_a_phase_is_judged_by_its_own_sites() -> None:
    planned, built = plan(0, 2), decoder()
    with planned.applied(built) as receipt:
        stepped(built, 2)
    own = experiment.own_sites(planned, workload().phases_numbered([2])[0], receipt.hits(2))
    assert [(hit.site, hit.calls) for hit in own] == [("MLP.activate", 10)]


def profile_of(preset: str, **fields: Any) -> ProfileRecord:
    found = Environment(
        device=Device(type="cuda", name="test"), python="", torch="", triton="", kernbench="", platform="", cpu="",
        cpu_threads=1, ceilings=Ceilings(copy_bytes_per_second=4e12),
    )  # fmt: skip
    info = WorkloadInfo(name="tts-decoder", preset=preset, dtype="bfloat16", seed=0, unit="frames")
    return ProfileRecord(
        run_id="", created_utc="", command="", environment=found, workload=info,
        steps=Steps(seconds=[0.1], units_per_step=1.0), launches_per_step=13000.0, **fields,
    )  # fmt: skip


def test_predictions_in_figures() -> None:
    predictions: Any = module("predictions")
    before = profile_of("1.7b", syncs_per_step=19.0)
    assert predictions.predict_no_syncs(before).syncs_per_step == 19.0
    # 103 layer passes with two norms of 8 launches and two sums, 16 final norms; two launches a layer and 16 remain.
    norm = predictions.predict_fused_norm(before)
    assert norm.launches_per_step == 103 * 18 + 16 * 8 - 2 * 103 - 16
    assert norm.ratio_high == pytest.approx(13000 / (13000 - norm.launches_per_step))
    spots = [Hotspot(name="k", self_seconds_per_step=1e-3, share=0.1, calls_per_step=206.0, phase=2)]
    assert predictions.predict_fused_swiglu(profile_of("1.7b", hotspots=spots)).launches_per_step == 103
    assert predictions.predict_fused_rope(before).ratio_high is None


def test_prediction_of_the_graph_is_the_busy_time() -> None:
    predictions: Any = module("predictions")
    idle = Idle(busy_seconds_per_step=0.02, idle_seconds_per_step=0.08, causes={"sync": 0.05})
    before = profile_of("1.7b", idle=idle)
    assert predictions.predict_graph(before).ratio_high == pytest.approx(5.0)
    assert predictions.predict_no_syncs(before).ratio_high == pytest.approx(2.0)


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that would launch on a GPU: all but views and what allocates."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: int = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (operator.is_view or operator.overloadpacket.__name__.startswith(("empty", "new_empty")))
        return operator(*args, **(kwargs or {}))


def launched(numbers: tuple[int, ...], use: dict[int, str]) -> int:
    """By a steady frame in bfloat16 with fixed codes."""
    built = decoder(dtype=torch.bfloat16)
    module("checks").feed_fixed_codes(built)
    chosen = dict.fromkeys(numbers, "eager") | use
    planned = swap.plan(workload(), numbers, use=chosen, kernels=lambda name: registry.kernel(name).declaration)
    with planned.applied(built), torch.no_grad():
        built.step(0)
        with Launches() as launches:
            built.run_frame()
    found: int = launches.count
    return found


def test_phase_6_launches_as_many_fewer_as_it_predicts() -> None:
    """Four frames, two of them through the interpreter, which compares each of 3072 tokens with each."""
    predict: Any = module("predictions").predict_choices
    saved = launched(NUMBERS[:-1], {}) - launched(NUMBERS, {6: "triton"})
    assert saved == predict(profile_of("tiny")).launches_per_step == 3 * 3 + 2 + 30
    assert predict(profile_of("1.7b")).launches_per_step == 15 * 3 + 2 + 30


@pytest.mark.parametrize("preset", ["tiny", "0.6b", "1.7b"])
def test_every_phase_predicts(preset: str) -> None:
    for phase in workload().phases:
        predict: Callable[[ProfileRecord], Any] = phase.predict
        assert predict(profile_of(preset)).text == phase.predicts

"""Verdicts follow from recorded evidence alone."""

import pytest

from kernbench.record import ParityResult, Ratio, SiteHit
from kernbench.verdict import decide


def row(passed=True, reason=""):
    return ParityResult(kernel="k", case="ragged", dtype="float32", mode="plain", passed=passed, reason=reason)


def ratio(median, low, high, floor=0.012):
    return Ratio(median=median, low=low, high=high, noise_floor=floor, rounds=30, steps_per_round=2)


RAN = [SiteHit(site="A.b", implementation="triton", calls=20, calls_per_step=1.0)]
NEVER = [*RAN, SiteHit(site="A.c", implementation="triton", calls=0, calls_per_step=0.0)]


def rare(calls, steps):
    hit = SiteHit(site="A.d", implementation="python", calls=calls, calls_per_step=calls / steps, every=50, steps=steps)
    return [*RAN, hit]


GREEN = row()


def judge(parity=(GREEN,), figures=None, receipt=RAN, measured=True, **others):
    return decide(parity=list(parity), ratio=figures, receipt=receipt, speed_measured=measured, **others)


def test_faster_beyond_interval_and_floor_is_kept():
    verdict = judge(figures=ratio(1.31, 1.28, 1.34), syncs_before=6.0, syncs_after=0.0)
    assert verdict.decision == "keep"
    assert verdict.sentence == "keep: 1.31x faster (99 % interval 1.28 to 1.34, n = 30 rounds, A/A floor 1.2 %)"
    assert verdict.reasons == ["1 of 1 parity checks passed", "host syncs per step: 6 before, 0 after"]


def test_slower_beyond_interval_and_floor_is_rejected():
    verdict = judge(figures=ratio(0.8, 0.75, 0.9))
    assert verdict.decision == "reject"
    assert verdict.sentence.startswith("reject: 1.25x slower (99 % interval 1.11 to 1.33,")


@pytest.mark.parametrize(
    ("figures", "why"),
    [
        (ratio(1.05, 0.99, 1.1), "the interval contains 1"),
        (ratio(0.95, 0.9, 1.01), "the interval contains 1"),
        (ratio(1.01, 1.001, 1.02), "the effect is within the A/A floor"),
        (ratio(0.99, 0.98, 0.995), "the effect is within the A/A floor"),
        (ratio(1.0, 1.0, 1.0, floor=0.0), "the interval contains 1"),
    ],
)
def test_an_effect_that_is_not_shown_is_inconclusive(figures, why):
    verdict = judge(figures=figures)
    assert verdict.decision == "inconclusive"
    assert "no change shown" in verdict.sentence
    assert verdict.reasons[-1] == why


def test_failed_parity_rejects_whatever_the_speed_and_shows_three_reasons():
    verdict = judge(
        parity=[row(), *[row(False, f"error {i}") for i in range(4)]], figures=ratio(9, 8, 10), receipt=NEVER
    )
    assert verdict.decision == "reject"
    assert verdict.sentence == "reject: 4 of 5 parity checks failed"
    assert verdict.reasons == [f"k, ragged, float32, plain: error {i}" for i in range(3)]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"parity": [], "figures": ratio(2, 1.9, 2.1)}, "no parity check ran"),
        ({"receipt": [], "figures": ratio(2, 1.9, 2.1)}, "the phase replaced nothing"),
        ({"receipt": NEVER, "figures": ratio(2, 1.9, 2.1)}, "the replacement at A.c never ran in these steps"),
        ({"receipt": NEVER, "figures": ratio(0.5, 0.4, 0.6)}, "the replacement at A.c never ran in these steps"),
        ({"measured": False, "not_measured_reason": "interpreter"}, "interpreter"),
        ({"measured": False, "figures": ratio(2, 1.9, 2.1)}, "the speed was not measured"),
        ({}, "the speed was not measured"),
    ],
)
def test_missing_evidence_is_inconclusive(arguments, sentence):
    verdict = judge(**arguments)
    assert verdict.decision == "inconclusive"
    assert verdict.sentence == f"inconclusive: {sentence}"


@pytest.mark.parametrize(
    ("calls", "steps", "decision"), [(0, 30, "keep"), (0, 50, "keep"), (0, 51, "inconclusive"), (1, 60, "keep")]
)
def test_a_site_that_was_not_due_in_the_race_is_no_evidence_against(calls, steps, decision):
    assert judge(figures=ratio(1.31, 1.28, 1.34), receipt=rare(calls, steps)).decision == decision

"""bio-nanochat's plan: flags, claims, and what the phases promise from a profile."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from bio_parts import module

from kernbench import registry


def profile(*, device: str = "cuda", phase: int = 1, waited: float | None = 0.02, seconds: float = 0.1) -> Any:
    """What predictions read of a profile: a step of 100 ms, 30 ms of it attention in 250 launches a step."""
    spot = SimpleNamespace(phase=phase, self_seconds_per_step=0.03, calls_per_step=250.0)
    return SimpleNamespace(
        steps=SimpleNamespace(seconds=[seconds]),
        hotspots=[spot],
        idle=SimpleNamespace(causes={} if waited is None else {"sync": waited}),
        environment=SimpleNamespace(device=SimpleNamespace(type=device), ceilings=None),
        workload=SimpleNamespace(preset="tiny", parameters=1000),
        syncs_per_step=40.0,
    )


def test_phases_have_the_flags_of_the_plan() -> None:
    flags = {phase.number: phase.flag for phase in registry.workload("bio-nanochat").declaration.phases}
    assert flags[0] == "BIO_SYNC_FREE"
    assert flags[1] == "BIO_FUSED_PRESYN"
    assert flags[2] == "BIO_FUSED_METRICS"
    assert flags[3] == "BIO_FUSED_GENETICS"
    assert flags[4] == "BIO_FUSED_PLASTICITY"
    assert flags[5] == "BIO_GRAPH"
    assert flags[6] == "BIO_FULL_PRODUCTS"


def test_every_phase_says_what_it_promises() -> None:
    for phase in registry.workload("bio-nanochat").declaration.phases:
        assert phase.predicts
        assert phase.claim or phase.number == 6, "the plan says something of every phase but the one beyond it"
        assert phase.predict is not None


@pytest.mark.parametrize("name", ["predict_no_reads", "predict_metrics"])
def test_without_waits_a_step_gains_what_it_idled(name: str) -> None:
    predict = getattr(module("predictions"), name)
    found = predict(profile())
    assert found.ratio_low == 1.0
    assert found.ratio_high == pytest.approx(0.1 / 0.08)
    assert predict(profile(waited=None)).ratio_high is None


def test_attention_can_at_best_vanish() -> None:
    predict = module("predictions").predict_presyn
    found = predict(profile())
    assert found.ratio_high == pytest.approx(0.1 / 0.07)
    # Two layers keep four kernels each.
    assert found.launches_per_step == 242
    assert predict(profile(device="cpu")).launches_per_step is None
    assert predict(profile(phase=7)).ratio_high is None


def test_a_graph_gains_the_time_the_device_idles() -> None:
    before = profile()
    before.idle.busy_seconds_per_step = 0.04
    found = module("predictions").predict_graph(before)
    assert (found.ratio_low, found.ratio_high) == (1.0, pytest.approx(0.1 / 0.04))

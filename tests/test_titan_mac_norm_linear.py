"""TitanMAC's phase 4: norm and linear as one kernel, with both attentions and in every dataflow."""

from __future__ import annotations

import pytest
import torch
from test_titan_mac import small
from test_titan_mac_phases import assert_same_state, profile, run, workload

from kernbench import record


@pytest.mark.parametrize(
    ("variant", "attention"), [("mag", "windowed"), ("mag", "block"), ("mac", "windowed"), ("mal", "block")]
)
def test_norm_and_linear_train_like_the_baseline(variant: str, attention: str) -> None:
    config = small(variant=variant, attention=attention)
    before, after = (run(config, numbers, 10) for numbers in ((), (4,)))
    assert after.losses() == pytest.approx(before.losses(), rel=1e-12)
    assert_same_state(after, before, rtol=1e-9)


def test_the_losses_differ_by_rounding_alone_in_float32() -> None:
    before, after = (run(small(), numbers, 10, torch.float32) for numbers in ((), (4,)))
    assert after.losses() == pytest.approx(before.losses(), rel=1e-5)


def test_all_but_the_matrix_products_may_go() -> None:
    (phase,) = workload().phases_numbered((4,))
    spots = [
        record.Hotspot(name="norm", self_seconds_per_step=0.002, share=0.2, calls_per_step=30, phase=4, op="aten::mul"),
        record.Hotspot(name="gemm", self_seconds_per_step=0.003, share=0.3, calls_per_step=6, phase=4, op="aten::mm"),
        record.Hotspot(name="other", self_seconds_per_step=0.001, share=0.1, calls_per_step=6, op="aten::mul"),
    ]
    # The step is 10 ms.
    assert phase.predict(profile(hotspots=spots)).ratio_high == pytest.approx(10 / 8)

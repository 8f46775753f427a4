"""bio-nanochat's step without reads, which is what a CUDA graph takes: counted on the CPU, captured on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bio_parts import module
from test_bio_gpu import built, config, plan
from test_bio_reads import counted

IN_PLACE = (0, 1, 2, 3)
WARM, REPLAYS = 3, 4


@pytest.mark.parametrize("preset", ["tiny-structure", "tiny-muon"])
def test_with_genes_and_moves_on_the_device_nothing_is_read(preset: str) -> None:
    assert counted(preset, {0: "python", 2: "eager", 3: "eager", 4: "eager"}) == {}


def test_the_controller_reads_where_its_phase_is_not_in_place() -> None:
    assert counted("tiny-structure", {0: "python", 2: "eager", 3: "eager"})["structure"] > 0


def launch(training: Any) -> torch.Tensor:
    """What a step of phase 0 launches, on the first batch."""
    loss: torch.Tensor = training.differentiate(0)
    training.gradient_norm = torch.nn.utils.clip_grad_norm_(training.parameters, training.config.clip)
    training.update()
    training.after_step()
    return loss


def capturable(training: Any) -> Any:
    for group in training.optimizers[0].param_groups:
        group["capturable"] = True
    return training


@pytest.mark.gpu
def test_a_step_is_captured_and_replayed() -> None:
    quiet = module("config").StructureConfig(every=0)
    eager, captured = (capturable(built(config(structure=quiet, log_every=1000))) for _ in range(2))
    with plan(*IN_PLACE).applied(eager):
        losses = [float(launch(eager)) for _ in range(WARM + REPLAYS)]
    with plan(*IN_PLACE).applied(captured):
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = [float(launch(captured)) for _ in range(WARM)]
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = launch(captured)
        for _ in range(REPLAYS):
            graph.replay()
            found.append(float(loss))
    assert found == pytest.approx(losses, rel=1e-2)
    assert found[-1] < found[0]
    for one, other in zip(eager.model.mixtures(), captured.model.mixtures(), strict=True):
        torch.testing.assert_close(other.fatigue, one.fatigue, rtol=0.05, atol=1e-3)

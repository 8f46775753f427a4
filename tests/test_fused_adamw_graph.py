"""The fused AdamW in a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from test_fused_adamw import DEVICE, SIZES, SPEC, STATE, copied, fresh


@pytest.mark.gpu
def test_a_captured_graph_repeats_the_update_with_gradients_inside_it() -> None:
    ours = fresh(SIZES)
    reference = copied(ours)
    SPEC.optimized(**ours)
    SPEC.reference(**reference)
    scale = torch.ones((), device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inside = {**ours, "grads": [grad * scale for grad in ours["grads"]]}
        SPEC.optimized(**inside)
    for factor in (1.0, 2.0, 0.5):
        scale.fill_(factor)
        graph.replay()
        SPEC.reference(**{**reference, "grads": [grad * factor for grad in reference["grads"]]})
    SPEC.optimized(**ours)
    SPEC.reference(**reference)
    for name in (*STATE, "steps"):
        torch.testing.assert_close(ours[name], reference[name])


@pytest.mark.gpu
def test_graphs_are_captured_one_after_the_other() -> None:
    ours = fresh(SIZES)
    reference = copied(ours)
    SPEC.optimized(**ours)
    SPEC.reference(**reference)
    graphs = []
    for factor in (1.0, 2.0, 0.5):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            SPEC.optimized(**{**ours, "grads": [grad * factor for grad in ours["grads"]]})
        graphs.append((factor, graph))
    for factor, graph in graphs:
        graph.replay()
        SPEC.reference(**{**reference, "grads": [grad * factor for grad in reference["grads"]]})
    for name in (*STATE, "steps"):
        torch.testing.assert_close(ours[name], reference[name])


@pytest.mark.gpu
def test_a_capture_without_a_call_before_it_says_what_to_do() -> None:
    inputs = fresh([(5,)])
    SPEC.optimized(**fresh([(6,)]))
    with (
        pytest.raises(RuntimeError, match="once outside of the CUDA graph capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        SPEC.optimized(**inputs)

"""Jobs for several gloo ranks that train bio-nanochat, each in a child process, which has torch imported already."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from bio_parts import CPU, module, small, training

from kernbench import group, registry, swap
from kernbench.children import isolation, jobs
from kernbench.children.worker import Job, Tell
from kernbench.progress import Silent
from kernbench.ranks import local_places

BATCH = 3


def at_once(ranks: Sequence[Job]) -> list[Any]:
    """What the jobs of all ranks return, each computing with one thread."""

    def answer(job: Job) -> Any:
        return isolation.run(job, lambda found: None, isolation.Terms(200, threads=1), Silent())

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(answer, ranks))


def trained(built: Any, phases: Sequence[int], use: str) -> dict[str, Any]:
    """Four steps with phases in place; what the ranks should have in common, and what not."""
    workload = registry.workload("bio-nanochat").declaration
    kernels = registry.kernels()
    plan = swap.plan(workload, phases, use=dict.fromkeys(phases, use), kernels=lambda name: kernels[name].declaration)
    with plan.applied(built):
        losses = [float(built.step(index)) for index in range(4)]
    score = built.scores[0]
    score.log.flush()
    built.controller.settle()
    return {
        "losses": losses,
        "lineage": built.controller.lineage,
        "parameters": sum(float(one.detach().double().abs().sum()) for one in built.model.parameters()),
        "hebbian": float(built.model.blocks[0].mlp.inner.hebbian.abs().sum()),
        "logged": score.log_entries[-1]["mean contribution"],
        "own": float(score.contribution.mean()),
    }


@dataclass(frozen=True)
class Train:
    """One rank's part of it, with the references of kernels."""

    imports: ClassVar[tuple[str, ...]] = jobs.COMPILER
    rank: int
    ranks: int
    meeting: Path
    phases: tuple[int, ...]

    def run(self, tell: Tell) -> dict[str, Any]:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{self.meeting}", rank=self.rank, world_size=self.ranks
        )
        built = training(small(experts=4, log_every=2, structure=module("config").LIVELY))
        found = trained(built, self.phases, "eager")
        torch.distributed.destroy_process_group()
        return found


@dataclass(frozen=True)
class Differentiate:
    """Gradients of one batch per rank; returns how far they are from the mean of what one process finds for each
    rank's batch, and what was sent when."""

    imports: ClassVar[tuple[str, ...]] = jobs.COMPILER
    rank: int
    ranks: int
    port: int

    def run(self, tell: Tell) -> dict[str, Any]:
        vars(module("parallel"))["BUCKET_NUMBERS"] = 2000
        config = small(synapses=module("synapses").SynapticConfig(stochastic_train_frac=0.0))
        alone = [_gradients(training(config), BATCH * self.ranks + one) for one in range(self.ranks)]
        expected = [torch.stack(each).mean(0) for each in zip(*alone, strict=True)]
        with group.joined(local_places(self.ranks, self.port)[self.rank], CPU, 60):
            built = training(config)
            mean = built.gradient_mean
            finish, sent = mean.finish, []

            def watched() -> None:
                sent.append(len(mean.under_way))
                finish()

            mean.finish = watched
            found = _gradients(built, BATCH)
        pairs = list(zip(found, expected, alone[self.rank], strict=True))
        return {
            "off": max(float((one - other).abs().max()) for one, other, _ in pairs),
            "own_off": max(float((own - other).abs().max()) for _, other, own in pairs),
            "largest": max(float(other.abs().max()) for _, other, _ in pairs),
            "buckets": len(mean.buckets),
            "sent_in_backward": sent[0],
        }


def _gradients(built: Any, index: int) -> list[torch.Tensor]:
    built.seed_noise(index)
    built.differentiate(*built.batch(index))
    return [parameter.grad for parameter in built.parameters]

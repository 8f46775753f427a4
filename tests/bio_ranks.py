"""One of several gloo ranks that train bio-nanochat: started by a test with a rank, their number, a file to meet at,
and the phases in place.

Prints what the ranks should have in common, and what not, as one line of JSON.
"""

from __future__ import annotations

import json
import sys

import torch
from bio_parts import module, small, training

from kernbench import registry, swap


def main(rank: int, ranks: int, meeting: str, phases: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    built = training(small(experts=4, log_every=2, structure=module("config").LIVELY))
    workload = registry.workload("bio-nanochat").declaration
    kernels = registry.kernels()
    use = dict.fromkeys(phases, "eager")
    plan = swap.plan(workload, phases, use=use, kernels=lambda name: kernels[name].declaration)
    with plan.applied(built):
        losses = [float(built.step(index)) for index in range(4)]
    score = built.scores[0]
    score.log.flush()
    built.controller.settle()
    found = {
        "losses": losses,
        "lineage": built.controller.lineage,
        "parameters": sum(float(one.detach().double().abs().sum()) for one in built.model.parameters()),
        "hebbian": float(built.model.blocks[0].mlp.inner.hebbian.abs().sum()),
        "logged": score.log_entries[-1]["mean contribution"],
        "own": float(score.contribution.mean()),
    }
    torch.distributed.destroy_process_group()
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], tuple(map(int, sys.argv[4].split(","))))

"""One of several gloo ranks that take gradients of bio-nanochat; a test gives a rank, their number and a port.

Prints as JSON how far they are from the mean of what one process finds for each rank's batch, and what was sent when.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from bio_parts import CPU, module, small, training

from kernbench import group
from kernbench.ranks import local_places

INDEX = 3


def gradients(built: Any, index: int) -> list[torch.Tensor]:
    built.seed_noise(index)
    built.differentiate(*built.batch(index))
    return [parameter.grad for parameter in built.parameters]


def main(rank: int, ranks: int, port: int) -> None:
    torch.set_num_threads(1)
    vars(module("parallel"))["BUCKET_NUMBERS"] = 2000
    config = small(synapses=module("synapses").SynapticConfig(stochastic_train_frac=0.0))
    alone = [gradients(training(config), INDEX * ranks + one) for one in range(ranks)]
    expected = [torch.stack(each).mean(0) for each in zip(*alone, strict=True)]
    with group.joined(local_places(ranks, port)[rank], CPU, 60):
        built = training(config)
        mean = built.gradient_mean
        finish, sent = mean.finish, []

        def watched() -> None:
            sent.append(len(mean.under_way))
            finish()

        mean.finish = watched
        found = gradients(built, INDEX)
    pairs = list(zip(found, expected, alone[rank], strict=True))
    told = {
        "off": max(float((one - other).abs().max()) for one, other, _ in pairs),
        "own_off": max(float((own - other).abs().max()) for _, other, own in pairs),
        "largest": max(float(other.abs().max()) for _, other, _ in pairs),
        "buckets": len(mean.buckets),
        "sent_in_backward": sent[0],
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

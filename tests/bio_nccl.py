"""One of two ranks that train bio-nanochat on a GPU each with compiled kernels: started by a test with its rank, a file
to meet at, and the phases in place.

Prints what the ranks should have in common, and what not, as one line of JSON.
"""

from __future__ import annotations

import json
import sys

import torch
from bio_parts import module, small, training
from bio_ranks import trained

from kernbench import device

RANKS = 2


def main(rank: int, meeting: str, phases: tuple[int, ...]) -> None:
    place = device.resolve(f"cuda:{rank}")
    torch.cuda.set_device(place)
    torch.distributed.init_process_group(
        "nccl", init_method=f"file://{meeting}", rank=rank, world_size=RANKS, device_id=place
    )
    config = small(experts=4, log_every=2, structure=module("config").LIVELY)
    built = training(config, dtype=torch.float32, device=place)
    found = trained(built, phases, "triton")
    torch.distributed.destroy_process_group()
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], tuple(map(int, sys.argv[3].split(","))))

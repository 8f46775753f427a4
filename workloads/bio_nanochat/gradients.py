"""The mean of all ranks' gradients, taken while the backward pass still runs.

A bucket is sent as soon as its gradients are there. Every rank sends its buckets in one order, whatever order the
gradients come in, so that the collectives match.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, distributed, nn

from .parallel import buckets, world


class GradientMean:
    """Averages the gradients of ``parameters`` between ``begin`` and ``finish``; with one rank it sets no hook."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.ranks = world()[1]
        self.buckets: list[list[Tensor]] = buckets(parameters) if self.ranks > 1 else []
        self.missing = [0] * len(self.buckets)
        self.under_way: list[tuple[Tensor, distributed.Work]] = []
        for number, bucket in enumerate(self.buckets):
            for parameter in bucket:
                hook = partial(self._arrived, number)
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """Expect the gradients of one backward pass."""
        self.under_way = []
        self.missing = [len(bucket) for bucket in self.buckets]

    def finish(self) -> None:
        """Send what is left, and leave means in place of all gradients; a parameter without one counts as zero."""
        while len(self.under_way) < len(self.buckets):
            self._send()
        for bucket, (flat, work) in zip(self.buckets, self.under_way, strict=True):
            work.wait()
            flat /= self.ranks
            parts = torch.split(flat, [parameter.numel() for parameter in bucket])
            for parameter, part in zip(bucket, parts, strict=True):
                parameter.grad = part.view(parameter.shape)
        self.under_way = []

    def _arrived(self, number: int, parameter: Tensor) -> None:
        self.missing[number] -= 1
        while len(self.under_way) < len(self.buckets) and not self.missing[len(self.under_way)]:
            self._send()

    @torch.no_grad()
    def _send(self) -> None:
        """Send the bucket whose turn it is."""
        bucket = self.buckets[len(self.under_way)]
        flat = torch.cat([(torch.zeros_like(one) if one.grad is None else one.grad).reshape(-1) for one in bucket])
        work = distributed.all_reduce(flat, async_op=True)
        assert work is not None
        self.under_way.append((flat, work))

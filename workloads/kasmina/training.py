"""An MLP with a Kasmina layer that learns to read digits, as an object that kernbench can step, save and compare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .config import BLUEPRINTS, KasminaConfig
from .controller import PERIOD, Tamiyo
from .data import CLASSES, load_digits
from .layer import KasminaLayer
from .lifecycle import Life

MIXED = (
    (Life.GRAFTING, 44),
    (Life.TRAINING, 96),
    (Life.STABILIZATION, 15),
    (Life.DORMANT, 0),
    (Life.EVALUATING, 25),
    (Life.FINE_TUNING, 45),
    (Life.DORMANT, 0),
    (Life.GRAFTING, 10),
)
"""State and epochs that seeds of a mixed layer start in, in turn: within ten steps of a tiny layer some move on."""
GRAFTING_SHARE = 0.3
GRAFTING_EPOCHS = 25


class Classifier(nn.Module):
    """Pixels, Kasmina layer, ReLU, linear layer, classes."""

    def __init__(
        self, pixels: int, config: KasminaConfig, *, seed: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.kasmina = KasminaLayer(pixels, config, generator=generator, device=device, dtype=dtype)
        self.head = nn.Linear(config.width, CLASSES, device=device, dtype=dtype)
        bound = config.width**-0.5
        with torch.no_grad():
            for weight in self.head.parameters():
                weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))

    def forward(self, x_BF: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, pixels]."""
        logits: Tensor = self.head(functional.relu(self.kasmina(x_BF)))
        return logits


class Training:
    """One classifier, its optimizer, its controller and its data. ``units_per_step`` counts images.

    Where the preset asks for the forward pass alone, a step is the layer's, outside of autograd.
    """

    def __init__(
        self, config: KasminaConfig, *, device: torch.device, dtype: torch.dtype, seed: int, data: str | None
    ) -> None:
        self.config = config
        self.units_per_step = float(config.batch)
        self.digits = load_digits(data, batch=config.batch, device=device, dtype=dtype)
        pixels = self.digits.images.shape[1]
        self.model = Classifier(pixels, config, seed=seed, device=device, dtype=dtype)
        place_seeds(self.model.kasmina)
        self.tamiyo = Tamiyo(config.seeds, rate=config.loss_average_rate, device=device, dtype=dtype)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=config.lr, momentum=config.momentum)
        for weight in self.model.parameters():
            # Zeroed and never dropped: the loop leaves idle blueprints without a gradient, which momentum would notice.
            weight.grad = torch.zeros_like(weight)
        self.steps = 0
        # Phase 4's: the graphs of steps, and that of the last one.
        self.captured: dict[Any, Any] = {}
        self.standing: Any = None
        forward_only = config.step == "forward"
        self.output_BH = torch.zeros(config.batch, config.width, device=device, dtype=dtype) if forward_only else None
        self.bytes_per_step = forward_bytes(config, pixels, dtype) if forward_only else None

    def step(self, index: int) -> Tensor | None:
        """Forward, backward and update on batch ``index``, the loss 0-dim and detached; or one forward pass."""
        loss = self.run_batch(*self.digits.slice(index))
        self.steps += 1
        if loss is not None and (index + 1) % PERIOD == 0:
            self.tamiyo.act(self.model.kasmina)
        return loss

    def run_batch(self, images_BF: Tensor, classes_B: Tensor) -> Tensor | None:
        """A step but for the controller's round: what it launches is the same every time."""
        if self.output_BH is not None:
            with torch.no_grad():
                self.output_BH = self.model.kasmina(images_BF)
            return None
        self.optimizer.zero_grad(set_to_none=False)
        loss = functional.cross_entropy(self.model(images_BF), classes_B)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        loss = loss.detach()
        self.tamiyo.observe(loss)
        return loss

    def accuracy(self) -> float:
        """Share of the test images that are read right; the lifecycle does not notice."""
        self.model.eval()
        try:
            with torch.no_grad():
                best_N = self.model(self.digits.test_images).argmax(dim=1)
        finally:
            self.model.train()
        return float((best_N == self.digits.test_classes).double().mean())

    def figures(self, seconds_per_step: float) -> dict[str, tuple[float, str]]:
        """Test accuracy so far, or bandwidth; for a size of the source document its own figure beside the real one."""
        if self.bytes_per_step is None:
            return {"test accuracy": (100 * self.accuracy(), "%"), "after steps of training": (self.steps, "steps")}
        figures = {"bandwidth": (self.bytes_per_step / seconds_per_step / 1e9, "GB/s")}
        if self.config.document:
            counted = document_bytes(self.config)
            figures["bandwidth as the source document counts"] = (counted / seconds_per_step / 1e9, "GB/s")
            figures["share of its bytes that exist"] = (100 * blend_bytes(self.config, 4) / counted, "%")
        return figures

    def state_dict(self) -> dict[str, Any]:
        """Everything a later step depends on, and the last output where a step is a forward pass."""
        state = {
            "model": self.model.state_dict(),
            "tamiyo": self.tamiyo.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        return state if self.output_BH is None else {**state, "output": self.output_BH}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state_dict``, whatever phases it was written and is read with.

        Raises:
            ValueError: a seed has a blueprint or a schedule that is not there.
        """
        self.model.load_state_dict(state["model"])
        self.tamiyo.load_state_dict(state["tamiyo"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.model.kasmina.check_state()


def place_seeds(layer: KasminaLayer) -> None:
    """Put the seeds of a fresh layer where its preset starts."""
    config = layer.config
    for seed in range(config.seeds):
        if config.start == "mixed":
            state, epochs = MIXED[seed % len(MIXED)]
        elif seed < int(GRAFTING_SHARE * config.seeds):
            state, epochs = Life.GRAFTING, GRAFTING_EPOCHS
        else:
            state, epochs = Life.DORMANT, 0
        # Ids of networks start at 1, one for each seed; rows of the bank go round.
        blueprint = seed % BLUEPRINTS if config.blueprint == "bank" else seed + 1
        schedule = config.schedules[seed % len(config.schedules)]
        layer.place(seed, state, blueprint=blueprint, epochs=epochs * config.pace, schedule=schedule)


def forward_bytes(config: KasminaConfig, pixels: int, dtype: torch.dtype) -> float:
    """Bytes that a forward pass moves at least: images, weights and output of the linear layer, and the blend."""
    size = dtype.itemsize
    linear = config.batch * pixels + (pixels + 1) * config.width + config.batch * config.width
    return float(linear * size + blend_bytes(config, size))


def blend_bytes(config: KasminaConfig, size: int) -> int:
    """Unique bytes of the blend alone: every column read and written once, and the rows that grafting seeds read."""
    grafting = int(GRAFTING_SHARE * config.seeds) * config.chunk
    return (2 * config.batch * config.width + min(grafting, config.width)) * size


def document_bytes(config: KasminaConfig) -> int:
    """Bytes as the source document counts them: float32, S x C columns, 3 accesses if active and 2 if not."""
    grafting = int(GRAFTING_SHARE * config.seeds)
    return (3 * grafting + 2 * (config.seeds - grafting)) * config.chunk * config.batch * 4

"""The chunked layer as upstream's second PyTorch version has it: a Python loop over seeds that reads as it goes.

Shapes: B batch, H width, S seeds, C columns of a chunk, K rows of the bank.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .blueprints import NetworkBlueprint, operate
from .config import BLUEPRINTS, KasminaConfig
from .lifecycle import ACTIVE, ALLOWED, LEAST_EPOCHS, Context, Life, guards
from .schedules import ALPHA, WATCH_DRIFT, Metrics, ScheduleMemory, advance
from .state import ACCURACY, BLUEPRINT, EFFICIENCY, EPOCHS, ERRORS, LIFECYCLE, LOSS, SCHEDULE, STABILITY, SeedState

SPARSE_BELOW = 1e-6
TUNED_SHARE = 0.9
"""Share of the blueprint while it is fine-tuned."""
EMA_KEPT = 0.9
FAILURES_BEFORE_CULLING = 5
OPERATORS = 3


class KasminaLayer(nn.Module):
    """A linear layer whose output columns belong to seeds. ``active`` means training, grafting or fine-tuning."""

    def __init__(
        self,
        inputs: int,
        config: KasminaConfig,
        *,
        generator: torch.Generator,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(inputs, config.width, device=device, dtype=dtype)
        bound = inputs**-0.5
        with torch.no_grad():
            for weight in self.linear.parameters():
                weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))
        bank_KH = torch.randn(BLUEPRINTS, config.width, generator=generator)
        self.bank_KH = nn.Parameter(bank_KH.to(device, torch.promote_types(dtype, torch.float32)))
        self.networks = nn.ModuleDict()
        self.new_network = functools.partial(
            NetworkBlueprint, config.chunk, generator=generator, device=device, dtype=dtype
        )
        self.seeds = SeedState(config.seeds, device=device, dtype=dtype)
        self.schedules = ScheduleMemory(config.seeds)
        self.schedule_of: dict[int, int] = {}
        self.network_of: dict[int, int] = {}
        self.starts_S: Tensor
        self.ends_S: Tensor
        self.drift_ema_SC: Tensor
        self.seed_H: Tensor
        self.covered_H: Tensor
        self.widths_L: Tensor
        self.operator_S: Tensor
        seed_S = torch.arange(config.seeds, device=device)
        starts_S = (seed_S * config.chunk).clamp(max=config.width)
        self.register_buffer("starts_S", starts_S, persistent=False)
        self.register_buffer("ends_S", (starts_S + config.chunk).clamp(max=config.width), persistent=False)
        column_H = torch.arange(config.width, device=device)
        self.register_buffer("seed_H", (column_H // config.chunk).clamp(max=config.seeds - 1), persistent=False)
        self.register_buffer("covered_H", column_H < config.covered, persistent=False)
        widths_L = (self.ends_S - self.starts_S)[: config.live].to(self.seeds.performance_S4.dtype)
        self.register_buffer("widths_L", widths_L, persistent=False)
        self.register_buffer("operator_S", (seed_S % OPERATORS).to(torch.int32), persistent=False)
        watched = config.seeds if set(WATCH_DRIFT) & set(config.schedules) else 0
        ema_SC = torch.zeros(watched, config.chunk, device=device, dtype=self.seeds.performance_S4.dtype)
        self.register_buffer("drift_ema_SC", ema_SC)

    # The forward pass.

    def forward(self, x_BI: Tensor) -> Tensor:
        """The linear layer's output [B, H] with what the active seeds blend in. In evaluation nothing else happens."""
        return self.forward_seed_by_seed(x_BI)

    def forward_seed_by_seed(self, x_BI: Tensor) -> Tensor:
        """The loop; phase 0 comes back to it for networks that it cannot batch."""
        y_BH: Tensor = self.linear(x_BI)
        mask_S = self.active_mask()
        if not self.training:
            return self.process_chunks(y_BH, mask_S)
        if not mask_S.any():
            self.record_sums(y_BH.detach())
            self.seeds.age()
            return y_BH
        blended_BH = self.process_chunks(y_BH, mask_S)
        self.record_performance(y_BH.detach())
        self.seeds.age()
        self.advance_grafting()
        return blended_BH

    def active_mask(self) -> Tensor:
        """Which seeds compute, bool [S]."""
        active = torch.tensor(ACTIVE, dtype=torch.int32, device=self.starts_S.device)
        mask_S = torch.zeros_like(self.starts_S, dtype=torch.bool)
        for state in active:
            mask_S |= self.seeds.lifecycle_S == state
        return mask_S

    def split(self, y_BH: Tensor) -> Iterator[Tensor]:
        """The chunk of each seed, as views."""
        for seed in range(self.config.seeds):
            start = int(self.starts_S[seed].item())
            end = int(self.ends_S[seed].item())
            yield y_BH[:, start:end]

    def process_chunks(self, y_BH: Tensor, mask_S: Tensor) -> Tensor:
        """Blend seed by seed, and put the chunks together again."""
        chunks = []
        for seed, chunk_BC in enumerate(self.split(y_BH)):
            if mask_S[seed]:
                chunks.append(self.process(seed, chunk_BC))
            else:
                chunks.append(chunk_BC)
        chunks.append(y_BH[:, self.config.covered :])
        return torch.cat(chunks, dim=1)

    def process(self, seed: int, chunk_BC: Tensor) -> Tensor:
        """One active seed's chunk. A blueprint that raises is counted and blends nothing."""
        state = self.seeds.lifecycle_S[seed].item()
        blueprint = int(self.seeds.blueprint_S[seed].item())
        try:
            if state == Life.TRAINING:
                with torch.no_grad():
                    self.blend(seed, blueprint, chunk_BC, 1.0)
                return chunk_BC
            if state == Life.GRAFTING:
                return self.blend(seed, blueprint, chunk_BC, self.alpha(seed, blueprint), grafting=True)
            return self.blend(seed, blueprint, chunk_BC, TUNED_SHARE)
        except RuntimeError as error:
            self.fail(seed, error)
            return chunk_BC

    def blend(self, seed: int, blueprint: int, chunk_BC: Tensor, alpha: float, *, grafting: bool = False) -> Tensor:
        """A chunk with ``alpha`` of its blueprint; the bank's other operators know no alpha."""
        if self.config.blueprint == "bank":
            start = seed * self.config.chunk
            w_C = self.bank_KH[blueprint, start : start + chunk_BC.shape[1]]
            return operate(chunk_BC, w_C, alpha, self.operator(seed)).to(chunk_BC.dtype)
        network = self.networks[str(blueprint)]
        if grafting:
            with torch.no_grad():
                made_BC = network(chunk_BC)
        else:
            made_BC = network(chunk_BC)
        mixed: Tensor = (1 - alpha) * chunk_BC + alpha * made_BC
        return mixed

    def operator(self, seed: int) -> int:
        """Blend operator of a seed; known to the host, for it never changes."""
        return seed % OPERATORS

    def alpha(self, seed: int, blueprint: int) -> float:
        """How much of its blueprint a grafting seed blends in, by its schedule; in evaluation as much as last time."""
        if not self.training:
            return float(self.schedules.on_host()[seed, ALPHA])
        seeds = self.seeds
        epochs = seeds.epochs_S[seed].item()
        loss = seeds.performance_S4[seed, LOSS].item()
        accuracy = seeds.performance_S4[seed, ACCURACY].item()
        stability = seeds.performance_S4[seed, STABILITY].item()
        efficiency = seeds.performance_S4[seed, EFFICIENCY].item()
        if seed not in self.schedule_of:
            self.schedule_of[seed] = int(seeds.state_S8[seed, SCHEDULE].item())
        kind = self.schedule_of[seed]
        drift = self.drift(seed, blueprint) if kind in WATCH_DRIFT else 0.0
        seen = Metrics(epochs, loss, accuracy, stability, efficiency, drift)
        return advance(kind, self.schedules.on_host()[seed], seen, self.config)

    @torch.no_grad()
    def drift(self, seed: int, blueprint: int) -> float:
        """How far the blueprint's weights are from their moving average, as a share of it; moves the average."""
        start = int(seed * self.config.chunk)
        w_C = self.bank_KH[blueprint, start : start + self.config.chunk].to(self.drift_ema_SC.dtype)
        ema_C = self.drift_ema_SC[seed, : len(w_C)]
        drift = ((w_C - ema_C).norm() / ema_C.norm()).item()
        ema_C.mul_(EMA_KEPT).add_(w_C, alpha=1 - EMA_KEPT)
        return float(drift)

    def fail(self, seed: int, error: RuntimeError) -> None:
        """Count a blueprint's failure; one that fails too often is culled, or rolled back where nothing is culled."""
        warnings.warn(f"the blueprint of seed {seed} failed: {error}", RuntimeWarning, stacklevel=2)
        self.seeds.state_S8[seed, ERRORS] += 1
        if self.seeds.state_S8[seed, ERRORS].item() >= FAILURES_BEFORE_CULLING:
            culled = self.request_transition(seed, Life.CULLED, Context())
            if not culled:
                self.request_transition(seed, Life.ROLLED_BACK, Context())

    # Telemetry.

    @torch.no_grad()
    def record_performance(self, y_BH: Tensor) -> None:
        """Mean, variance and the four figures of every seed's chunk, taken before anything was blended in."""
        seeds = self.seeds
        for seed, chunk_BC in enumerate(self.split(y_BH)):
            variance = sparsity = mean = norm = 0.0
            if chunk_BC.numel():
                chunk_BC = chunk_BC.to(seeds.performance_S4.dtype)
                variance = chunk_BC.var(correction=0).item()
                sparsity = (chunk_BC.abs() < SPARSE_BELOW).to(chunk_BC.dtype).mean().item()
                mean = chunk_BC.mean().item()
                norm = chunk_BC.norm().item()
            figures = (variance + 0.1 * sparsity, 1 - sparsity, 1 / (1 + variance), min(1.0, norm))
            for column, figure in enumerate(figures):
                index = torch.tensor([seed], device=y_BH.device)
                seeds.performance_S4[index, column] = figure
            seeds.moments_S2[seed, 0].fill_(mean)
            seeds.moments_S2[seed, 1].fill_(variance)

    @torch.no_grad()
    def record_sums(self, y_BH: Tensor) -> None:
        """Sum and sum of squares of every chunk, for a layer in which no seed is active."""
        for seed, chunk_BC in enumerate(self.split(y_BH)):
            chunk_BC = chunk_BC.to(self.seeds.telemetry_S2.dtype)
            self.seeds.telemetry_S2[seed, 0].fill_(chunk_BC.sum().item())
            self.seeds.telemetry_S2[seed, 1].fill_(chunk_BC.square().sum().item())

    # The lifecycle.

    def advance_grafting(self) -> None:
        """Seeds that have grafted long enough go on to stabilize."""
        grafting_G = torch.nonzero(self.seeds.lifecycle_S == Life.GRAFTING).flatten()
        epochs_G = self.seeds.epochs_S[grafting_G]
        for place in range(len(grafting_G)):
            if epochs_G[place].item() >= LEAST_EPOCHS[Life.GRAFTING][Life.STABILIZATION] * self.config.pace:
                self.request_transition(int(grafting_G[place].item()), Life.STABILIZATION, Context())

    def request_transition(self, seed: int, target: Life, context: Context) -> bool:
        """Move a seed to ``target`` if that may follow, the seed has been in its state long enough, and the guard
        passes; whether it moved. Germination needs a blueprint: see :meth:`germinate`.

        Raises:
            ValueError: no such seed, or germination without a blueprint.
        """
        self.check_seed(seed)
        if target == Life.GERMINATED:
            raise ValueError("a seed germinates with a blueprint; call germinate(seed, blueprint)")
        return self.transition(seed, target, context)

    def transition(self, seed: int, target: Life, context: Context) -> bool:
        """:meth:`request_transition` to any state, for a seed that is there."""
        state = Life(int(self.seeds.state_S8[seed, LIFECYCLE].item()))
        if not ALLOWED[state][target]:
            return False
        epochs = self.seeds.state_S8[seed, EPOCHS].item()
        if epochs < LEAST_EPOCHS[state][target] * self.config.pace:
            return False
        if not guards(context).get((state, target), True):
            return False
        self.seeds.change(seed, target)
        return True

    def germinate(self, seed: int, blueprint: int) -> bool:
        """Give a dormant seed its blueprint; whether it was dormant.

        Raises:
            ValueError: no such seed or blueprint.
        """
        self.check_seed(seed)
        self.check_blueprint(blueprint)
        if not self.transition(seed, Life.GERMINATED, Context()):
            return False
        self.seeds.state_S8[seed, BLUEPRINT] = blueprint
        self.watch_drift(seed, blueprint)
        return True

    def place(self, seed: int, state: Life, *, blueprint: int, epochs: int, schedule: int) -> None:
        """Put a seed into ``state`` as if it had come there; for building a layer, before its first step.

        Raises:
            ValueError: no such seed or schedule, or no such blueprint for a seed that has one. A network is made for a
                seed that is the first to have its number, 1 or more.
        """
        self.check_seed(seed)
        self.check_schedule(schedule)
        if state != Life.DORMANT:
            if self.config.blueprint == "network" and blueprint >= 1 and str(blueprint) not in self.networks:
                self.networks[str(blueprint)] = self.new_network()
            self.check_blueprint(blueprint)
            self.network_of[seed] = blueprint
            self.seeds.state_S8[seed, BLUEPRINT] = blueprint
            self.watch_drift(seed, blueprint)
        self.seeds.state_S8[seed, LIFECYCLE] = state
        self.seeds.state_S8[seed, EPOCHS] = epochs
        self.seeds.state_S8[seed, SCHEDULE] = schedule

    @torch.no_grad()
    def watch_drift(self, seed: int, blueprint: int) -> None:
        """Let the moving average of a seed's blueprint begin at the blueprint itself."""
        if len(self.drift_ema_SC):
            w_C = self.bank_KH[blueprint, seed * self.config.chunk : (seed + 1) * self.config.chunk]
            self.drift_ema_SC[seed, : len(w_C)] = w_C

    @torch.no_grad()
    def rows_of_seeds(self) -> Tensor:
        """The blueprint of every seed on its own columns [S, C], zero where there is no column."""
        column_SC = self.starts_S[:, None] + torch.arange(self.config.chunk, device=self.starts_S.device)
        row_S1 = self.seeds.blueprint_S.clamp(min=0).long()[:, None]
        w_SC = self.bank_KH[row_S1, column_SC.clamp(max=self.config.width - 1)]
        return w_SC.masked_fill(column_SC >= self.ends_S[:, None], 0.0)

    def check_seed(self, seed: int) -> None:
        """Refuse a seed that is not there, by ValueError."""
        if not 0 <= seed < self.config.seeds:
            raise ValueError(f"there is no seed {seed}; this layer has 0 to {self.config.seeds - 1}")

    def check_blueprint(self, blueprint: int) -> None:
        """Refuse a blueprint that is not there, by ValueError."""
        known = sorted(map(int, self.networks)) if self.config.blueprint == "network" else range(BLUEPRINTS)
        if blueprint not in known:
            raise ValueError(f"there is no blueprint {blueprint}; this layer has {', '.join(map(str, known))}")

    def check_schedule(self, schedule: int) -> None:
        """Refuse a schedule that this layer does not have, by ValueError; kernels know which ones there are."""
        if schedule not in self.config.schedules:
            known = ", ".join(map(str, self.config.schedules))
            raise ValueError(f"there is no schedule {schedule}; this layer has {known}")

    def check_state(self) -> None:
        """Refuse a state that asks for what is not there; reads the device, so it is for loading.

        Raises:
            ValueError: a seed has no such schedule, or one beyond DORMANT no blueprint.
        """
        self.schedule_of.clear()
        self.network_of.clear()
        for seed, row in enumerate(self.seeds.state_S8.tolist()):
            try:
                self.check_schedule(row[SCHEDULE])
                if row[LIFECYCLE] != Life.DORMANT:
                    self.check_blueprint(row[BLUEPRINT])
                    self.network_of[seed] = row[BLUEPRINT]
            except ValueError as error:
                raise ValueError(f"seed {seed} is {Life(row[LIFECYCLE]).name}: {error}") from None

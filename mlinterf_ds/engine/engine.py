"""One training step at any layout: passes over micro-batches, sharded gradients, one update, one set of counters.

DeepSpeed partitions, gathers and reduces (`engine/zero.py`); the step itself is owned here, because a meta step has
several passes and must advance the schedule, the loss scale and the moments once.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mlinterf_ds.engine.frozen import NewRows
from mlinterf_ds.engine.optimizer import LossScale, adamw, apply, learning_rate
from mlinterf_ds.engine.precision import DTYPES, resolve
from mlinterf_ds.engine.space import FlatSpace, Space, Vector
from mlinterf_ds.engine.spikes import Spikes
from mlinterf_ds.engine.zero import forget_idle_persistence, shared_space
from mlinterf_ds.errors import UserError
from mlinterf_ds.pretrain.config import RunConfig
from mlinterf_ds.runtime.parallel import Layout, ModelParallelUnit

SHARED = "shared"
PATIENCE = 25  # steps skipped in a row before a run is declared lost


class Rows(Protocol):
    """What the engine needs of a batch; the model reads the rest."""

    @property
    def languages(self) -> Tensor: ...  # (rows,)
    @property
    def step_languages(self) -> tuple[int, ...]: ...
    def to(self, device: torch.device) -> Any: ...


class Engine:
    """Holds the model, its spaces (shared, and one a language), their AdamW states and the counters.

    The model: `model(batch)` gives (weighted loss, nll of every masked position); it has `languages`,
    `language_parameters()` and `shared_parameters()`.
    """

    def __init__(self, model: Any, config: RunConfig, deepspeed_json: dict[str, Any], precision: str, layout: Layout):
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        from mlinterf_ds.model.encoder import partition_dim

        self.config, self.layout, self.precision = config, layout, precision
        self.device = torch.device(get_accelerator().current_device_name())
        self.model = model.to(self.device, DTYPES[precision])
        self.languages: tuple[str, ...] = tuple(model.languages)
        self.scale = LossScale(precision == "fp16", deepspeed_json.get("fp16", {}))
        self.updates = self.skipped = self.skipped_in_a_row = 0
        self.new_rows: NewRows | None = None  # set: all else that is shared is frozen
        self.spikes = Spikes(config.train.spike)
        self.spiked = ""  # why the last step was skipped, if for its loss
        resolved = resolve(deepspeed_json, config, precision, layout.data)
        self.stage: int = resolved["zero_optimization"]["stage"]
        routed = {language: found for language, found in model.language_parameters().items() if found}
        shared = model.shared_parameters()
        dims = {name: partition_dim(parameter) for name, parameter in model.named_parameters()}
        for parameters in routed.values():
            for parameter in parameters.values():
                parameter.requires_grad_(False)  # not DeepSpeed's to reduce
        # DeepSpeed wants an optimizer to partition for; a stateless one, since the update is ours.
        placeholder = torch.optim.SGD(shared.values(), lr=0.0) if self.stage else None
        self.deepspeed, *_ = deepspeed.initialize(
            model=self.model, optimizer=placeholder, config=resolved, mpu=ModelParallelUnit(), dist_init_required=False
        )
        group = ModelParallelUnit().get_data_parallel_group()
        tensor_rank = layout.tensor_rank
        offload = resolved["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
        masters_on = torch.device("cpu") if offload else self.device
        self.spaces: dict[str, Space] = {}
        if self.stage == 0:
            self.spaces[SHARED] = FlatSpace(
                shared, dims, group, sharded=False, device=masters_on, tensor_rank=tensor_rank
            )
        else:
            self.spaces[SHARED] = shared_space(self.deepspeed, shared, dims, tensor_rank)
        if self.stage == 3:
            forget_idle_persistence(self.deepspeed, [p for found in routed.values() for p in found.values()])
        for language, parameters in routed.items():
            self.spaces[language] = FlatSpace(
                parameters, dims, group, sharded=self.stage > 0, device=masters_on, tensor_rank=tensor_rank
            )
        self.optimizers = {name: adamw(space.masters, config.train) for name, space in self.spaces.items()}
        self.rows = config.train.batch // layout.data
        self.micro = config.train.micro_batch or self.rows

    @property
    def step(self) -> int:
        """Steps attempted, the skipped ones included: the index of the next batch."""
        return self.updates + self.skipped

    def slices(self, rows: int, micro: int | None = None) -> list[tuple[int, int]]:
        """This rank's micro-batches (of `micro` rows, by default the run's) as (start, stop) rows of a global batch."""
        mine = rows // self.layout.data
        first, size = self.layout.data_rank * mine, min(micro or self.micro, mine)
        return [(first + start, first + min(start + size, mine)) for start in range(0, mine, size)]

    def train_step(self, batches: Sequence[Rows], spaces: Sequence[Space] | None = None) -> dict[str, float]:
        """One ordinary update of `spaces` (the shared parameters and the step's languages); the step's facts."""
        spaces = self.trained(batches[0].step_languages) if spaces is None else spaces
        sums = self.accumulate(batches, spaces)
        gradients = [space.gradient() for space in spaces]
        if self.new_rows:
            gradients[0] = self.new_rows.only(gradients[0])
        norm, losses = self._reduce(spaces, gradients, sums)
        norm /= self.scale.value
        facts = {"lr": learning_rate(self.config.train, self.updates + 1), "loss_scale": self.scale.value}
        facts |= {"gradient_norm": norm, **self.loss_facts(batches[0].step_languages, losses)}
        if self.settle(math.isfinite(norm), facts):
            clip = self.config.train.clip
            factor = (min(1.0, clip / (norm + 1e-6)) if clip else 1.0) / facts["loss_scale"]
            for space, gradient in zip(spaces, gradients, strict=True):
                self.update(space, gradient, factor, facts["lr"])
        return facts | {"skipped": float(self.skipped)}

    def trained(self, step_languages: Sequence[int]) -> list[Space]:
        """Of the active spaces those that are not frozen (train.freeze)."""
        active = self.active(step_languages)
        return active[1:] if self.config.train.freeze == "shared" and not self.new_rows else active

    def active(self, step_languages: Sequence[int]) -> list[Space]:
        """The spaces that a step over these languages trains: the shared one first."""
        names = [SHARED, *(self.languages[index] for index in step_languages)]
        return [self.spaces[name] for name in names if name in self.spaces]

    def name_of(self, space: Space) -> str:
        """'shared' or the language of a space."""
        return next(name for name, found in self.spaces.items() if found is space)

    def accumulate(self, batches: Sequence[Rows], spaces: Sequence[Space]) -> Tensor:
        """Forward and backward over this rank's micro-batches; only the gradients of `spaces` are computed.

        Returns (step's languages, 2) float64: sum of nll and count, this rank's rows. The loss is multiplied by the
        loss scale and by the number of data-parallel ranks (gradients are averaged over them, the weights of a batch
        sum to one over all of them).
        """
        step_languages = batches[0].step_languages
        sums = torch.zeros(len(step_languages), 2, dtype=torch.float64, device=self.device)
        through_deepspeed = self.stage > 0 and self.spaces[SHARED] in spaces
        if not self.model.training:  # it visits every module: of 100 languages, a tenth of a small step
            self.model.train()
        for space in self.spaces.values():
            space.require_grad(space in spaces)
        for number, batch in enumerate(batches):
            batch = batch.to(self.device)
            if through_deepspeed:
                self.deepspeed.set_gradient_accumulation_boundary(number == len(batches) - 1)
                loss, nll = self.deepspeed(batch)
                self.deepspeed.backward(loss * (self.scale.value * self.layout.data), scale_wrt_gas=False)
            else:
                loss, nll = self.model(batch)
                (loss * (self.scale.value * self.layout.data)).backward()
            sums += language_sums(nll, batch.languages, step_languages)
        return sums

    def _reduce(self, spaces: Sequence[Space], gradients: Sequence[Vector], sums: Tensor) -> tuple[float, Tensor]:
        """(global gradient norm, (languages, 2) global sums), one collective."""
        squares = [space.squared_norm(gradient).to(sums) for space, gradient in zip(spaces, gradients, strict=True)]
        facts = torch.cat([sum(squares, torch.zeros_like(squares[0])).view(1), sums.view(-1) / self.layout.tensor])
        dist.all_reduce(facts)
        return math.sqrt(value) if (value := facts[0].item()) >= 0 else math.nan, facts[1:].view(-1, 2)

    def loss_facts(self, step_languages: Sequence[int], sums: Tensor, prefix: str = "loss") -> dict[str, float]:
        """{"loss": over all positions, "loss/<language>": ...} from (languages, 2) global sums."""
        facts = {prefix: (sums[:, 0].sum() / sums[:, 1].sum()).item()}
        for index, (total, count) in zip(step_languages, sums.tolist(), strict=True):
            facts[f"{prefix}/{self.languages[index]}"] = total / count if count else math.nan
        return facts

    def settle(self, finite: bool, facts: Mapping[str, float]) -> bool:
        """Advance the counters once; False: the step is skipped, nothing else may change (a spike: not the loss scale)."""
        self.spiked = self.spikes.found(facts)
        if not self.spiked:  # else an overflow is the spike's
            self.scale.update(not finite)
        if finite and not self.spiked:
            self.updates, self.skipped_in_a_row = self.updates + 1, 0
            self.spikes.add(facts)
            return True
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= PATIENCE:
            what = f"the loss spiked ({self.spiked})" if self.spiked else "the gradient was not finite"
            hint = f", or raise train.spike={self.spikes.limit:g}" if self.spiked else ""
            raise UserError(
                f"{what} for {PATIENCE} steps in a row (step {self.step}, loss scale {self.scale.value:g}): the run has "
                f"diverged; lower train.lr or resume from an earlier checkpoint{hint}"
            )
        return False

    def update(self, space: Space, gradient: Vector, factor: float, lr: float) -> None:
        """AdamW on one space's shards by factor * gradient, then its working weights."""
        if factor != 1.0:
            gradient = [piece.mul_(factor) for piece in gradient]
        frozen = self.new_rows if space is self.spaces[SHARED] else None
        with frozen.kept(space.masters) if frozen else contextlib.nullcontext():
            apply(self.optimizers[self.name_of(space)], space.masters, gradient, lr)
        space.write()

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Rows]) -> float:
        """The weighted loss over all ranks' batches (their weights sum to one).

        Every rank must bring the same number of batches (ZeRO 3 gathers weights together).
        """
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in batches:
            total += self.model(batch.to(self.device))[0].double()
        dist.all_reduce(total)
        return total.item() / self.layout.tensor


def language_sums(nll: Tensor, languages: Tensor, step_languages: Sequence[int]) -> Tensor:
    """(step's languages, 2) float64: sum and count of nll (rows, masked) by the rows' language."""
    by_row = nll.detach().double().sum(dim=1)
    chosen = torch.tensor(step_languages, device=languages.device).view(-1, 1) == languages.view(1, -1)
    chosen = chosen.to(nll.device, torch.float64)
    masked_sum = torch.where(chosen.bool(), by_row, torch.zeros_like(by_row)).sum(dim=1)
    return torch.stack([masked_sum, chosen.sum(dim=1) * nll.shape[1]], dim=1)

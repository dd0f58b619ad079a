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

from mlinterf_ds.engine.optimizer import LossScale, Spikes, adamw, apply, clip_factor, learning_rate
from mlinterf_ds.engine.precision import DTYPES, resolve
from mlinterf_ds.engine.space import FlatSpace, NewRows, Space, Vector
from mlinterf_ds.engine.zero import Zero3FlatSpace, release_small_parameters, shared_space
from mlinterf_ds.errors import UserError
from mlinterf_ds.model.encoder import SHARED, partition_dim
from mlinterf_ds.runtime.parallel import Layout, ModelParallelUnit
from mlinterf_ds.sections import TrainConfig

PATIENCE = 25  # steps skipped in a row before a run is declared lost


class Rows(Protocol):
    """The attributes of a batch that the engine reads; the model reads the others."""

    @property
    def languages(self) -> Tensor: ...  # (rows,)
    @property
    def step_languages(self) -> tuple[int, ...]: ...
    def to(self, device: torch.device) -> Any: ...


class Engine:
    """A model in training: its parameter groups as spaces, an AdamW state for each of them, and the counters.

    The model: `model(batch)` gives (weighted loss, nll of every masked position); `parameter_groups()` gives its
    parameters by group and full name, the group `SHARED` among them; `languages` are the codes that batches index.
    A language's parameters are the group of its code, if it has any.
    """

    def __init__(
        self, model: Any, training: TrainConfig, deepspeed_json: dict[str, Any], precision: str, layout: Layout
    ):
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        self.training, self.layout, self.precision = training, layout, precision
        self.device = torch.device(get_accelerator().current_device_name())
        self.model = model.to(self.device, DTYPES[precision])
        self.languages: tuple[str, ...] = tuple(model.languages)
        self.scale = LossScale(precision == "fp16", deepspeed_json.get("fp16", {}))
        self.updates = self.skipped = self.skipped_in_a_row = 0
        self.new_rows: NewRows | None = None  # if set, the other shared parameters are frozen
        self.spikes = Spikes(training.spike)
        self.spiked = ""  # names the loss that spiked, if the last step was skipped because of it
        self.micro = training.micro_batch or training.batch // layout.data  # rows of a micro-batch
        resolved = resolve(deepspeed_json, training, precision, layout.data)
        self.stage: int = resolved["zero_optimization"]["stage"]
        groups = model.parameter_groups()
        for name, parameters in groups.items():
            for parameter in parameters.values():
                parameter.requires_grad_(name == SHARED)  # DeepSpeed reduces the shared ones alone
        # DeepSpeed wants an optimizer to partition for; a stateless one, since the update happens here.
        placeholder = torch.optim.SGD(groups[SHARED].values(), lr=0.0) if self.stage else None
        self.deepspeed, *_ = deepspeed.initialize(
            model=self.model, optimizer=placeholder, config=resolved, mpu=ModelParallelUnit(), dist_init_required=False
        )
        offload = resolved["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
        self.spaces = self._make_spaces(groups, torch.device("cpu") if offload else self.device)
        self.optimizers = {name: adamw(space.masters, training) for name, space in self.spaces.items()}

    def _make_spaces(self, groups: Mapping[str, dict[str, Any]], masters_on: torch.device) -> dict[str, Space]:
        """A space for each parameter group, by its name; DeepSpeed keeps the shared one from ZeRO 1 on."""
        kind, data_group = (
            Zero3FlatSpace if self.stage == 3 else FlatSpace,
            ModelParallelUnit().get_data_parallel_group(),
        )
        dims = {name: partition_dim(parameter) for name, parameter in self.model.named_parameters()}
        spaces: dict[str, Space] = {}
        if self.stage == 3:
            release_small_parameters(self.deepspeed, groups)
        for name, parameters in groups.items():
            if name == SHARED and self.stage:
                spaces[name] = shared_space(self.deepspeed, parameters, dims, self.layout.tensor_rank)
            else:
                spaces[name] = kind(
                    name,
                    parameters,
                    dims,
                    self.layout.tensor_rank,
                    data_group,
                    sharded=self.stage > 0,
                    device=masters_on,
                )
        return spaces

    # -- steps -------------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Steps attempted, the skipped ones included: the index of the next batch."""
        return self.updates + self.skipped

    @property
    def learning_rate(self) -> float:
        """The schedule's rate for the next update."""
        return learning_rate(self.training, self.updates + 1)

    def slices(self, rows: int, micro: int | None = None) -> list[tuple[int, int]]:
        """This rank's micro-batches (of `micro` rows, by default the run's) as (start, stop) rows of a global batch."""
        rank_rows = rows // self.layout.data
        first, size = self.layout.data_rank * rank_rows, min(micro or self.micro, rank_rows)
        return [(first + start, first + min(start + size, rank_rows)) for start in range(0, rank_rows, size)]

    def groups_of(self, step_languages: Sequence[int]) -> list[str]:
        """The groups that a step over these languages trains: the shared one first, unless it is frozen."""
        names = [SHARED, *(self.languages[index] for index in step_languages)]
        frozen = self.training.freeze == "shared" and not self.new_rows
        return [name for name in names[frozen:] if name in self.spaces]

    def train_step(self, batches: Sequence[Rows], rates: Mapping[str, float] | None = None) -> dict[str, float]:
        """One ordinary update; returns the step's facts.

        rates: the groups to train, each with its learning rate; by default those of the step's languages at the
        schedule's rate.
        """
        languages = batches[0].step_languages
        rates = rates or dict.fromkeys(self.groups_of(languages), self.learning_rate)
        spaces = [self.spaces[name] for name in rates]
        sums = self.accumulate(batches, spaces)
        gradients = [space.gradient() for space in spaces]
        if self.new_rows:
            gradients[0] = self.new_rows.only(gradients[0])
        norm, losses = self._reduce(spaces, gradients, sums)
        norm /= self.scale.value
        facts = {"lr": next(iter(rates.values())), "loss_scale": self.scale.value, "gradient_norm": norm}
        facts |= self.loss_facts(languages, losses)
        if self.settle(math.isfinite(norm), facts):
            factor = clip_factor(norm, self.training.clip) / facts["loss_scale"]
            for space, gradient in zip(spaces, gradients, strict=True):
                self.update(space, gradient, factor, rates[space.name])
        return facts | {"skipped": float(self.skipped)}

    def accumulate(self, batches: Sequence[Rows], spaces: Sequence[Space]) -> Tensor:
        """Forward and backward over this rank's micro-batches; only the gradients of `spaces` are computed.

        Returns (step's languages, 2) float64: sum of nll and count, this rank's rows. The loss is multiplied by the
        loss scale and by the number of data-parallel ranks (gradients are averaged over them, the weights of a batch
        sum to one over all of them).
        """
        step_languages = batches[0].step_languages
        sums = torch.zeros(len(step_languages), 2, dtype=torch.float64, device=self.device)
        through_deepspeed = self.stage > 0 and self.spaces[SHARED] in spaces
        if not self.model.training:  # `train()` visits every module: with 100 languages, a tenth of a small step
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
        """(global gradient norm, (languages, 2) global sums), in one collective."""
        squares = [space.share_of_dot(own, own).to(sums) for space, own in zip(spaces, gradients, strict=True)]
        reduced = torch.cat([sum(squares, torch.zeros_like(squares[0])).view(1), sums.view(-1) / self.layout.tensor])
        dist.all_reduce(reduced)
        square = reduced[0].item()
        return math.sqrt(square) if square >= 0 else math.nan, reduced[1:].view(-1, 2)

    def loss_facts(self, step_languages: Sequence[int], sums: Tensor, prefix: str = "loss") -> dict[str, float]:
        """{"loss": over all positions, "loss/<language>": ...} from (languages, 2) global sums."""
        facts = {prefix: (sums[:, 0].sum() / sums[:, 1].sum()).item()}
        for index, (total, count) in zip(step_languages, sums.tolist(), strict=True):
            facts[f"{prefix}/{self.languages[index]}"] = total / count if count else math.nan
        return facts

    def settle(self, finite: bool, facts: Mapping[str, float]) -> bool:
        """Advance the counters once. False: the step is skipped, and nothing else may change.

        finite: whether all gradients are; if not, the loss scale falls. A spike of the step's losses (`facts`) skips the
        step too, and leaves the loss scale as it is.
        """
        self.spiked = self.spikes.spike(facts)
        if not self.spiked:  # else the spike explains an overflow
            self.scale.update(not finite)
        if finite and not self.spiked:
            self.updates, self.skipped_in_a_row = self.updates + 1, 0
            self.spikes.add(facts)
            return True
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= PATIENCE:
            reason = f"the loss spiked ({self.spiked})" if self.spiked else "the gradient was not finite"
            hint = f", or raise train.spike={self.spikes.limit:g}" if self.spiked else ""
            raise UserError(
                f"{reason} for {PATIENCE} steps in a row (step {self.step}, loss scale {self.scale.value:g}): the run has "
                f"diverged; lower train.lr or resume from an earlier checkpoint{hint}"
            )
        return False

    def update(self, space: Space, gradient: Vector, factor: float, rate: float) -> None:
        """AdamW at this learning rate on one space's shards by factor * gradient, then its working weights."""
        if factor != 1.0:
            gradient = [shard.mul_(factor) for shard in gradient]
        new_rows = self.new_rows if space.name == SHARED else None
        with new_rows.alone_change(space.masters) if new_rows else contextlib.nullcontext():
            apply(self.optimizers[space.name], space.masters, gradient, rate)
        space.write()

    def evaluate(self, batches: Iterable[Rows]) -> float:
        """The weighted loss of all ranks' batches without dropout (see `weighted_loss`)."""
        self.model.eval()
        return weighted_loss(self.model, batches, self.device, self.layout)


@torch.no_grad()
def weighted_loss(model: Any, batches: Iterable[Rows], device: torch.device, layout: Layout) -> float:
    """The sum of the losses of all ranks' batches, in nats: their mean loss, where their weights sum to one.

    Every rank must bring the same number of batches (ZeRO 3 gathers weights together).
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch in batches:
        total += model(batch.to(device))[0].double()
    dist.all_reduce(total)
    return total.item() / layout.tensor


def language_sums(nll: Tensor, languages: Tensor, step_languages: Sequence[int]) -> Tensor:
    """(step's languages, 2) float64: sum and count of nll (rows, masked) by the rows' language."""
    by_row = nll.detach().double().sum(dim=1)
    chosen = (torch.tensor(step_languages, device=languages.device).view(-1, 1) == languages.view(1, -1)).to(nll.device)
    sums = torch.where(chosen, by_row, 0.0).sum(dim=1)
    return torch.stack([sums, chosen.sum(dim=1, dtype=torch.float64) * nll.shape[1]], dim=1)

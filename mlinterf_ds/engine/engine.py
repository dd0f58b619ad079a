"""One training step at any layout: passes over micro-batches, sharded gradients, one update, one set of counters.

DeepSpeed partitions, gathers and reduces (`engine/zero.py`); the step itself is owned here, because a meta step has
several passes and must advance the schedule, the loss scale and the moments once.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from mlinterf_ds.engine.optimizer import LOSS_PREFIX, LossScale, Spikes, adamw, apply, clip_factor, learning_rate
from mlinterf_ds.engine.passes import Passes
from mlinterf_ds.engine.precision import DTYPES, resolve
from mlinterf_ds.engine.space import FlatSpace, NewRows, Placement, ShardedSpace, Space, Vector
from mlinterf_ds.engine.transfers import IdleSpaces, StepFacts, on_device
from mlinterf_ds.engine.zero import Zero3ShardedSpace, release_small_parameters, shared_space
from mlinterf_ds.errors import UserError
from mlinterf_ds.model.encoder import SHARED, Rows, partition_dim
from mlinterf_ds.runtime.parallel import Layout, ModelParallelUnit
from mlinterf_ds.sections import TrainConfig

FEW_LANGUAGES = 8  # languages up to which train.idle_languages=auto keeps all on the device
PATIENCE = 25  # steps skipped in a row before a run is declared lost


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
        self.scale = LossScale(precision == "fp16", deepspeed_json.get("fp16", {}), self.device)
        self._updates = self._skipped = self.skipped_in_a_row = 0
        self._unread: StepFacts | None = None  # the newest step's, as long as the counters do not include it
        self.new_rows: NewRows | None = None  # if set, the other shared parameters are frozen
        self.spikes = Spikes(training.spike)
        self._no_spike = torch.zeros((), dtype=torch.bool, device=self.device)
        self._no_sums = torch.empty(0, dtype=torch.float64, device=self.device)
        self.spiked = ""  # names the loss that spiked, if the last step was skipped because of it
        self.micro = training.fixed_micro_batch or training.batch // layout.data  # rows of a micro-batch
        resolved = resolve(deepspeed_json, training, precision, layout.data)
        self.stage: int = resolved["zero_optimization"]["stage"]
        offload = resolved["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
        # one data-parallel rank has nothing to partition: without offload, stages 1 and 2 are stage 0 there
        self.partitioned = self.stage == 3 or (self.stage > 0 and (layout.data > 1 or offload))
        if not self.partitioned:
            resolved["zero_optimization"] = {"stage": 0}
        groups = model.parameter_groups()
        for name, parameters in groups.items():
            for parameter in parameters.values():
                parameter.requires_grad_(name == SHARED)  # DeepSpeed reduces the shared ones alone
        # DeepSpeed wants an optimizer to partition for; a stateless one, since the update happens here.
        placeholder = torch.optim.SGD(groups[SHARED].values(), lr=0.0) if self.partitioned else None
        self.deepspeed, *_ = deepspeed.initialize(
            model=self.model, optimizer=placeholder, config=resolved, mpu=ModelParallelUnit(), dist_init_required=False
        )
        away = self.languages if self._idle_on_host(offload) else ()
        self.spaces = self._make_spaces(groups, torch.device("cpu") if offload else self.device, away)
        frozen = [SHARED] if self.frozen else []
        self.optimizers = {name: adamw(space.masters, training, name in frozen) for name, space in self.spaces.items()}
        self.passes = Passes(self)
        kept_away = [space for name, space in self.spaces.items() if name in away]
        self.idle = IdleSpaces(kept_away, self.optimizers, self.device)

    def _idle_on_host(self, offload: bool) -> bool:
        """Whether the languages' groups are kept in host memory between their steps."""
        if self.training.idle_languages == "auto":
            return self.device.type != "cpu" and not offload and len(self.languages) > FEW_LANGUAGES
        return self.training.idle_languages == "host"

    def _make_spaces(
        self, groups: Mapping[str, dict[str, Any]], masters_on: torch.device, away: Sequence[str]
    ) -> dict[str, Space]:
        """A space for each parameter group, by its name; DeepSpeed keeps the shared one where it is partitioned.

        away: the groups whose masters are made in host memory, since a device need not hold those of all languages at once.
        """
        kind: type[FlatSpace | ShardedSpace] = Zero3ShardedSpace if self.stage == 3 else ShardedSpace
        if self.stage < 3 and (self.layout.data == 1 or not self.partitioned):
            kind = FlatSpace
        dims = {name: partition_dim(parameter) for name, parameter in self.model.named_parameters()}
        group = ModelParallelUnit().get_data_parallel_group()
        here = Placement(dims, self.layout.tensor_rank, group, masters_on)
        if self.stage == 3:
            release_small_parameters(self.deepspeed, groups)
        spaces: dict[str, Space] = {}
        for name, parameters in groups.items():
            if name == SHARED and self.partitioned:
                spaces[name] = shared_space(self.deepspeed, parameters, dims, self.layout.tensor_rank)
            else:
                own = kind(name, parameters, here._replace(device=torch.device("cpu")) if name in away else here)
                if isinstance(own, FlatSpace):
                    own.lasting = name == SHARED and not own.hands_over
                spaces[name] = own
        return spaces

    # -- steps -------------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Steps attempted, the skipped ones included: the index of the next batch."""
        return self._updates + self._skipped + (self._unread is not None)

    @property
    def updates(self) -> int:
        """Steps that counted; waits for the newest one."""
        self.settle()
        return self._updates

    @property
    def skipped(self) -> int:
        """Steps that did not count; waits for the newest one."""
        self.settle()
        return self._skipped

    def start_at(self, updates: int, skipped: int) -> None:
        """Sets the counters to those of a checkpoint."""
        self._unread, self._updates, self._skipped = None, updates, skipped

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
        return [name for name in names[self.frozen :] if name in self.spaces]

    def train_new_rows(self, old: int) -> None:
        """Trains the vocabulary's pieces from number `old` on, although the shared parameters are frozen."""
        if self.frozen:
            space = self.spaces[SHARED]
            self.optimizers[SHARED] = adamw(space.masters, self.training)
            self.new_rows = NewRows(space, old, self.layout.tensor_rank)

    @property
    def frozen(self) -> bool:
        """Whether no shared parameter is trained."""
        return self.training.freeze == "shared" and not self.new_rows

    def train_step(
        self, batches: Sequence[Rows], rates: Mapping[str, float] | None = None, groups: Sequence[str] = ()
    ) -> StepFacts:
        """One ordinary update; returns the step's facts, which the device may still be computing.

        rates: learning rate by group, for all groups to train. Without it `groups` (default: those of the step's languages) are trained
        at the schedule's rate, which is read only after the passes are launched, since it waits for the step before.
        """
        languages = batches[0].step_languages
        spaces = [self.spaces[name] for name in rates or groups or self.groups_of(languages)]
        self.idle.fetch(spaces)
        sums = self.accumulate(batches, spaces)
        self.idle.wait()
        gradients = [space.gradient() for space in spaces]
        if self.new_rows:
            gradients[0] = self.new_rows.only(gradients[0])
        self.settle()  # the step before, while the device computes this one's passes
        rates = rates or dict.fromkeys((space.name for space in spaces), self.learning_rate)
        squares = [space.share_of_dot(own, own).to(sums.device) for space, own in zip(spaces, gradients, strict=True)]
        square, sums = self.reduced(squares[0] if len(squares) == 1 else torch.stack(squares).sum(), sums)
        norm = square.sqrt() / self.scale.tensor
        computed = {"gradient_norm": norm} | self.loss_facts(languages, sums)
        finite, spiked = torch.isfinite(norm), self.spiking(computed)
        skip = ~finite | spiked
        divisor = self.scale.tensor / clip_factor(norm, self.training.clip)
        for space, gradient in zip(spaces, gradients, strict=True):
            self.update(space, gradient, divisor, rates[space.name], skip)
        self.idle.release(spaces)
        known = {"lr": next(iter(rates.values())), "loss_scale": self.scale.value}
        return self.finish_step(known, computed, finite, spiked)

    def accumulate(self, batches: Sequence[Rows], spaces: Sequence[Space], losses: bool = True) -> Tensor:
        """Forward and backward over this rank's micro-batches; only the gradients of `spaces` are computed.

        Returns the sum of nll and the count of predictions in this rank's rows, (step's languages, 2) float64, or an empty
        tensor without `losses`. The loss is multiplied by the loss scale and by the number of data-parallel ranks:
        gradients are averaged over the ranks, while the weights of a batch sum to one over all of them.
        """
        step_languages = batches[0].step_languages
        sums = self._no_sums
        if not self.model.training:  # `train()` visits every module: with 100 languages, a tenth of a small step
            self.model.train()
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            nll = self.passes.run(batch, spaces, last)
            if losses:
                of_batch = language_sums(nll, batch.languages, step_languages)
                sums = sums + of_batch if len(sums) else of_batch
            if not last:
                for space in spaces:
                    space.absorb()
        return sums

    def reduced(self, values: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Returns both tensors summed over all ranks, in one collective.

        sums: (languages, 2), of which the ranks of a tensor-parallel group hold replicas.
        """
        if self.layout.world == 1:
            return values, sums
        both = torch.cat([values.view(-1), sums.view(-1) / self.layout.tensor])
        dist.all_reduce(both)
        return both[: values.numel()].view(values.shape), both[values.numel() :].view(-1, 2)

    def loss_facts(self, step_languages: Sequence[int], sums: Tensor, prefix: str = "loss") -> dict[str, Tensor]:
        """{"loss": over all positions, "loss/<language>": ...}, scalars, from (languages, 2) global sums."""
        if len(step_languages) == 1:
            loss = torch.div(*sums[0].unbind())
            return {prefix: loss, f"{prefix}/{self.languages[step_languages[0]]}": loss}
        by_language = sums[:, 0] / sums[:, 1]
        total = sums.sum(dim=0)
        names = [f"{prefix}/{self.languages[index]}" for index in step_languages]
        return {prefix: total[0] / total[1]} | dict(zip(names, by_language.unbind(), strict=True))

    def spiking(self, computed: Mapping[str, Tensor]) -> Tensor:
        """Whether a loss among these facts of a step is a spike (a bool scalar); the step before must be settled."""
        losses = {
            name.removeprefix(LOSS_PREFIX): loss for name, loss in computed.items() if name.startswith(LOSS_PREFIX)
        }
        bounds = [self.spikes.bound(language) for language in losses]
        if all(math.isinf(bound) for bound in bounds):
            return self._no_spike
        values = torch.stack(list(losses.values()))
        return ((values > on_device(bounds, self.device)) & torch.isfinite(values)).any()

    def finish_step(
        self,
        known: Mapping[str, float],
        computed: Mapping[str, Tensor],
        finite: Tensor,
        spiked: Tensor,
        counted: Callable[[Mapping[str, float]], None] | None = None,
    ) -> StepFacts:
        """The facts of a step whose work is launched. Reading them counts the step; the next step reads them at the latest.

        finite: whether all gradients are finite; if not, the loss scale falls. spiked: whether a loss is a spike, which
        also skips the step but leaves the loss scale as it is. counted: called with the facts if the step counts.
        """
        self.scale.foresee(~finite, spiked)
        verdict = {"finite": finite, "spiked": spiked}
        self._unread = StepFacts(known, {**computed, **verdict}, partial(self._count, counted))
        return self._unread

    def settle(self) -> None:
        """Waits for the newest step, if its facts are not known yet, and counts it."""
        if self._unread is not None:
            self._unread.read()

    def _count(
        self, counted: Callable[[Mapping[str, float]], None] | None, facts: dict[str, float]
    ) -> dict[str, float]:
        """Advances the counters once by a step's facts; idle groups are in host memory then, for whoever reads them there."""
        self._unread = None
        self.idle.finish()
        finite, spiked = bool(facts.pop("finite")), bool(facts.pop("spiked"))
        self.spiked = self.spikes.spike(facts) if spiked else ""
        if not spiked:  # a spike explains an overflow by itself
            self.scale.update(not finite)
        if finite and not spiked:
            self._updates, self.skipped_in_a_row = self._updates + 1, 0
            self.spikes.add(facts)
            if counted:
                counted(facts)
        else:
            self._skipped, self.skipped_in_a_row = self._skipped + 1, self.skipped_in_a_row + 1
            self._refuse_to_go_on()
        return {"skipped": float(self._skipped)}

    def _refuse_to_go_on(self) -> None:
        """Raises UserError after PATIENCE steps in a row that did not count."""
        if self.skipped_in_a_row >= PATIENCE:
            reason = f"the loss spiked ({self.spiked})" if self.spiked else "the gradient was not finite"
            hint = f", or raise train.spike={self.spikes.limit:g}" if self.spiked else ""
            raise UserError(
                f"{reason} for {PATIENCE} steps in a row (step {self.step}, loss scale {self.scale.value:g}): the run has "
                f"diverged; lower train.lr, for example in a new run from an earlier checkpoint's weights (init=CHECKPOINT){hint}"
            )

    def update(self, space: Space, gradient: Vector, divisor: Tensor, rate: float, skip: Tensor) -> None:
        """AdamW at this learning rate on one space's shards by gradient / divisor, then its working weights.

        If `skip`, masters and moments stay as they are.
        """
        new_rows = self.new_rows if space.name == SHARED else None
        with new_rows.alone_change(space.masters) if new_rows else contextlib.nullcontext():
            apply(self.optimizers[space.name], space.masters, gradient, rate, divisor, skip)
        space.write()

    def evaluate(self, batches: Iterable[Rows]) -> float:
        """The weighted loss of all ranks' batches without dropout (see `weighted_loss`)."""
        self.model.eval()
        return weighted_loss(self.passes.scored, batches, self.device, self.layout)


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
    """(step's languages, 2) float64: sum and count of nll (rows, masked) by the rows' language; languages: on the host."""
    if len(step_languages) == 1:
        return F.pad(nll.sum(dtype=torch.float64).view(1, 1), (0, 1), value=nll.numel())
    by_row = nll.double().sum(dim=1)
    chosen = (torch.tensor(step_languages).view(-1, 1) == languages.view(1, -1)).double()
    if nll.device.type != "cpu":
        chosen = chosen.pin_memory().to(nll.device, non_blocking=True)
    sums = (chosen * by_row).sum(dim=1)
    return torch.stack([sums, chosen.sum(dim=1) * nll.shape[1]], dim=1)

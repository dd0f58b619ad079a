"""Learning a language's masks on a frozen model (paper, Eq. 1), and scoring the model that they prune.

    min over pi of  E_q(z|pi) [ L(f(x; theta * z), y) ] + lambda E ||theta * z||_0 / ||theta||_0

L is the masked-language-model loss in nats and theta the gated parameters, so lambda is what it costs to keep all of them. z are
hard concrete gates with log-odds pi, drawn anew for every row of a batch: one draw for the whole batch has the same expectation and
more noise. pi starts at 0, because any other common start would enter every cosine between languages.

Text, masks and gates are functions of (seed, language, step, row), so layouts differ by round-off only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mlinterf_ds.analysis.config import PruneSection
from mlinterf_ds.analysis.job import Report
from mlinterf_ds.analysis.masks import hard_concrete
from mlinterf_ds.analysis.masks.gates import Gates
from mlinterf_ds.data.batch import Batch, generator, key
from mlinterf_ds.data.evaluation import EvaluationSet
from mlinterf_ds.data.stream import TrainStream
from mlinterf_ds.data.windows import TokenSource
from mlinterf_ds.engine.engine import weighted_loss
from mlinterf_ds.engine.optimizer import LossScale
from mlinterf_ds.errors import UserError
from mlinterf_ds.model.encoder import Encoder
from mlinterf_ds.runtime.parallel import Layout
from mlinterf_ds.sections import RowFormat

RANDOM = 3  # random prunings with which a learned one is compared
EVALUATED = 64  # rows that are scored at once
EPS = 1e-15  # Adam's epsilon; gradients shrink as the number of groups grows


@dataclass
class Subject:
    """A frozen model whose groups are gated, and the text it is pruned on."""

    model: Encoder
    gates: Gates
    corpus: TokenSource
    layout: Layout
    device: torch.device
    scale: LossScale
    row_format: RowFormat

    def learn(self, language: str, seed: int, settings: PruneSection, report: Report) -> Tensor:
        """Learn pi (groups,) of one language: fp32 on the CPU, the same on every rank. The model is left unchanged."""
        batches = self._batches(language, seed, settings)
        pi = torch.zeros(self.gates.count, device=self.device, requires_grad=True)
        optimizer = torch.optim.Adam([pi], eps=EPS)
        weights = self.gates.weights().to(self.device)
        every = max(1, settings.steps // 20)
        for step in range(settings.steps):
            loss, gradient = self._gradient(pi, batches(step))
            chance = hard_concrete.nonzero(pi.detach())
            if self._finite(gradient, f"language {language!r}, step {step}"):
                pi.grad = gradient + settings.penalty * weights * chance * (1 - chance)
                optimizer.param_groups[0]["lr"] = settings.lr * (1 - step / settings.steps)
                optimizer.step()
            if step % every == 0 or step == settings.steps - 1:
                name = f"prune/{language}/{seed}"
                report({f"{name}/loss": loss, f"{name}/nonzero": float((weights * chance).sum())}, step)
        return pi.detach().cpu()

    def _batches(
        self, language: str, seed: int, settings: PruneSection
    ) -> Callable[[int], Iterator[tuple[Batch, Tensor]]]:
        """A function from the step to this rank's micro-batches, each with its draws for the gates (rows, groups)."""
        own_seed = key(seed, "prune", language) >> 1
        stream = TrainStream(self.corpus, [language], rows=settings.rows, row_format=self.row_format, seed=own_seed)
        index, source = self.model.languages.index(language), key(own_seed, "gates", size=16)
        rows = settings.rows // self.layout.data
        first, size = self.layout.data_rank * rows, settings.micro_batch or rows

        def of_step(step: int) -> Iterator[tuple[Batch, Tensor]]:
            for start in range(first, first + rows, size):
                stop = min(start + size, first + rows)
                batch = in_language(stream.batch(step, start, stop), index)
                uniform = draws(source, step, start, stop, self.gates.count)
                yield batch.to(self.device), uniform.to(self.device)

        return of_step

    def _gradient(self, pi: Tensor, batches: Iterable[tuple[Batch, Tensor]]) -> tuple[float, Tensor]:
        """The loss of all ranks' rows under sampled gates, and its gradient (groups,); the same on all ranks."""
        loss, pi.grad = torch.zeros(1, device=self.device), None
        for batch, uniform in batches:
            with self.gates.applied(hard_concrete.sample(pi, uniform)):
                part, _ = self.model(batch)
            (part * self.scale.value).backward()
            loss += part.detach()
        assert pi.grad is not None
        replicas = self.gates.replicas().to(self.device)
        summed = torch.cat([pi.grad / (replicas * self.scale.value), loss / self.layout.tensor])
        dist.all_reduce(summed)  # over the rows of all data-parallel ranks and the slices of all tensor-parallel ranks
        return summed[-1].item(), summed[:-1]

    def _finite(self, gradient: Tensor, where: str) -> bool:
        """Whether the step may be taken; after an overflow in fp16 it is skipped and the loss scale lowered."""
        finite = bool(torch.isfinite(gradient).all())
        hopeless = not self.scale.dynamic or self.scale.value <= self.scale.minimum
        if not finite and hopeless:
            raise UserError(
                f"{where}: the gradient of the masks is not finite: the model has diverged, or try "
                "--set train.precision=fp32"
            )
        self.scale.update(not finite)
        return finite

    def perplexity(self, language: str, gates: Tensor, rows: int) -> float:
        """The perplexity of `rows` rows of the language's validation split, under gates (groups,)."""
        text = EvaluationSet(
            self.corpus,
            language,
            "valid",
            languages=self.model.languages,
            row_format=self.row_format,
            max_rows=rows,
        )
        batches = text.batches(EVALUATED, self.layout.data_rank, self.layout.data)
        with self.gates.applied(gates.to(self.device)[None]):
            loss = weighted_loss(self.model, batches, self.device, self.layout)
        return math.exp(min(loss, 700.0))  # the loss of a ruined model may be too large for exp

    def scores(self, language: str, pi: Tensor, seed: int, rows: int) -> dict[str, float]:
        """The perplexities of the full model, the pruned model, and random prunings (mean and standard error).

        `pruned` has the learned gates, some of which lie between 0 and 1. `kept_whole` has 1 for each gate above 0. The random
        prunings also have gates of 0 and 1, and keep as many groups of each module.
        """
        learned = hard_concrete.gate(pi)
        whole = (learned > 0).float()
        perplexities = {
            "full": self.perplexity(language, torch.ones_like(pi), rows),
            "pruned": self.perplexity(language, learned, rows),
            "kept_whole": self.perplexity(language, whole, rows),
        }
        random = [
            self.perplexity(language, self._shuffled(whole, key(seed, "random", language, draw)), rows)
            for draw in range(RANDOM)
        ]
        error = float(np.std(random, ddof=1) / RANDOM**0.5)
        return perplexities | {"random": float(np.mean(random)), "random_error": error}

    def _shuffled(self, kept: Tensor, seed: int) -> Tensor:
        """A random choice of as many groups of each module."""
        source, kept = torch.Generator().manual_seed(seed >> 1), kept.clone()
        for site in self.gates.sites:
            groups = slice(site.start, site.start + site.size)
            kept[groups] = kept[groups][torch.randperm(site.size, generator=source)]
        return kept


def draws(source: int, step: int, start: int, stop: int, count: int) -> Tensor:
    """(rows, count) float32 draws of U(0, 1) for the rows from `start` to `stop` of a step; a row's draws do not depend on these."""
    blocks = -(-count // 4)  # the generator makes four draws at a time
    uniform = generator(source, step, skip=start * blocks).random((stop - start, 4 * blocks))
    return torch.from_numpy(uniform[:, :count].astype(np.float32))


def in_language(batch: Batch, index: int) -> Batch:
    """A batch of a one-language stream, with the language's index in the model."""
    return replace(batch, languages=torch.full_like(batch.languages, index), step_languages=(index,))

"""PCGrad (Yu et al. 2020), the paper's reference for gradient conflict and a baseline beside the meta step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mlinterf_ds.engine.engine import Engine
from mlinterf_ds.engine.optimizer import clip_factor
from mlinterf_ds.engine.space import Vector
from mlinterf_ds.engine.transfers import StepFacts
from mlinterf_ds.meta.bilevel import norm
from mlinterf_ds.model.encoder import SHARED


def project(gradients: Sequence[Vector], products: np.ndarray, random: np.random.Generator) -> tuple[Vector, int]:
    """The sum of the projected gradients and the number of projections, from the gradients' (L, L) inner products.

    Each language's gradient loses its components along the gradients that it conflicts with (negative cosine), one after the
    other in random order. Gradients are this rank's shards; inner products are over all ranks. Every projected gradient is a combination of the given ones, so their inner products are all that is needed.
    """
    count = len(gradients)
    coefficients = np.eye(count)  # row i: gradient i after its projections, as a combination of the originals
    projections = 0
    for i in range(count):
        for j in random.permutation([other for other in range(count) if other != i]):
            conflict = coefficients[i] @ products[:, j]
            if conflict < 0 and products[j, j] > 0:
                coefficients[i, j] -= conflict / products[j, j]
                projections += 1
    total = coefficients.sum(axis=0)
    summed = [torch.zeros_like(shard) for shard in gradients[0]]
    for weight, gradient in zip(total, gradients, strict=True):
        for sum_shard, shard in zip(summed, gradient, strict=True):
            sum_shard.add_(shard, alpha=float(weight))
    return summed, projections


def pcgrad_step(engine: Engine, batches: Sequence[Any], seed: int) -> StepFacts:
    """One update of the shared parameters on a mixed batch by the languages' projected gradients; the step's facts.

    Each language has a pass over the same micro-batches, in which the other languages' positions have weight zero, so that
    every rank takes part in the same collectives whatever rows it holds. `seed` and the step decide the order of projections.
    """
    space, languages = engine.spaces[SHARED], batches[0].step_languages
    gradients: list[Vector] = []
    sums = torch.zeros(len(languages), 2, dtype=torch.float64, device=engine.device)
    for index, language in enumerate(languages):
        own = [replace(batch, weights=batch.weights * (batch.languages == language).view(-1, 1)) for batch in batches]
        sums[index] += engine.accumulate(own, [space])[index]
        gradients.append([shard.div_(engine.scale.tensor.to(shard.device)) for shard in space.gradient()])
    engine.settle()
    products = torch.stack([space.share_of_dot(left, right) for left in gradients for right in gradients])
    products, sums = engine.reduced(products.to(engine.device), sums)
    known, computed = {"lr": engine.learning_rate, "loss_scale": engine.scale.value}, engine.loss_facts(languages, sums)
    finite, spiked = torch.isfinite(products).all(), engine.spiking(computed)
    table = products.view(len(languages), -1).cpu().numpy()  # the order of projections depends on their signs
    total, projections = project(gradients, np.nan_to_num(table), np.random.default_rng([seed, engine.step]))
    computed["gradient_norm"] = length = norm(space, total)
    known["pcgrad/projections"] = float(projections)
    divisor = 1.0 / clip_factor(length, engine.training.clip)
    engine.update(space, total, divisor, known["lr"], ~finite | spiked)
    return engine.finish_step(known, computed, finite, spiked)

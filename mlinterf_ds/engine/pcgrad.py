"""PCGrad (Yu et al. 2020, the paper's reference for gradient conflict): a baseline beside the meta step.

Each language's gradient is projected off those it conflicts with (negative cosine), in a random order of the others;
the shared parameters follow the sum. Gradients are this rank's shards, products run over all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mlinterf_ds.engine.engine import Engine
from mlinterf_ds.engine.optimizer import clip_factor
from mlinterf_ds.engine.space import Vector
from mlinterf_ds.meta.bilevel import norm
from mlinterf_ds.model.encoder import SHARED


def project(gradients: Sequence[Vector], products: np.ndarray, random: np.random.Generator) -> tuple[Vector, int]:
    """(sum of the projected gradients, number of projections), from the gradients and their (L, L) inner products.

    Every projected gradient stays a combination of the given ones, so inner products alone decide it.
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
    summed = [torch.zeros_like(piece) for piece in gradients[0]]
    for weight, gradient in zip(total, gradients, strict=True):
        for into, piece in zip(summed, gradient, strict=True):
            into.add_(piece, alpha=float(weight))
    return summed, projections


def pcgrad_step(engine: Engine, batches: Sequence[Any], seed: int) -> dict[str, float]:
    """One update of the shared parameters on a mixed batch, by the languages' projected gradients.

    A pass for each language, over the same micro-batches with the other languages' positions at weight zero, so that
    every rank does the same collectives whatever rows it holds.
    """
    space, languages = engine.spaces[SHARED], batches[0].step_languages
    gradients: list[Vector] = []
    sums = torch.zeros(len(languages), 2, dtype=torch.float64, device=engine.device)
    for place, language in enumerate(languages):
        chosen = [replace(b, weights=b.weights * (b.languages == language).view(-1, 1)) for b in batches]
        sums[place] += engine.accumulate(chosen, [space])[place]
        gradients.append([piece.div_(engine.scale.value) for piece in space.gradient()])
    products = torch.stack([space.share_of_dot(left, right) for left in gradients for right in gradients]).to(
        engine.device
    )
    facts_ = torch.cat([products, sums.view(-1) / engine.layout.tensor])
    dist.all_reduce(facts_)
    table = facts_[: len(languages) ** 2].view(len(languages), -1).cpu().numpy()
    facts = {"lr": engine.learning_rate, "loss_scale": engine.scale.value}
    facts |= engine.loss_facts(languages, facts_[len(languages) ** 2 :].view(-1, 2))
    random = np.random.default_rng([seed, engine.step])
    if engine.settle(bool(np.isfinite(table).all()), facts):
        total, projections = project(gradients, table, random)
        facts["gradient_norm"] = length = norm(space, total)
        facts["pcgrad/projections"] = float(projections)
        engine.update(space, total, clip_factor(length, engine.training.clip), facts["lr"])
    return facts | {"skipped": float(engine.skipped)}

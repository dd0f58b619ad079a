"""What ranks of a gradient-conflict test run: similarities at any layout, the plain oracle, training with and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from mlinterf_ds.data.batch import Batch
from mlinterf_ds.engine import checkpoint
from mlinterf_ds.engine.engine import Engine
from mlinterf_ds.engine.optimizer import LossScale
from mlinterf_ds.gradients.measure import Draws, measure
from mlinterf_ds.gradients.similarity import DRAWS, group_of
from mlinterf_ds.pretrain.config import ConflictConfig
from mlinterf_ds.sections import RowFormat
from tests.model_batches import hidden as hidden_states
from tests.parity import bodies

ROWS = 8
Key = tuple[Any, str]  # (layer, component), as of Similarity.scopes


class Same(Draws):
    """Both batches of a language are the same one."""

    def batches(self, language: str, draw: int, measurement: int) -> list[Batch]:
        return super().batches(language, 0, measurement)


def drawn(engine: Engine, languages: tuple[str, ...], micro: int, rows: int = ROWS, kind: type[Draws] = Draws) -> Draws:
    config = ConflictConfig(sequences=rows, micro_batch=micro)  # type: ignore[call-arg]
    length = engine.model.embeddings.longest
    known = engine.languages
    return kind(
        bodies.Made(known), languages, known, config=config, row_format=RowFormat(length), seed=4, engine=engine
    )


def similarities(
    settings: list[str],
    json_name: str,
    tensor: int,
    sketch: str | int,
    micro: int = 2,
    seed: int = 0,
    same: bool = False,
) -> dict[Key, np.ndarray]:
    """Every scope's (2L, 2L) cosines at this layout."""
    engine, _, _ = bodies.make(settings, json_name, tensor)
    if engine.precision == "fp16":
        engine.scale = LossScale(True, {"initial_scale_power": 24})  # overflows at first
    before = engine.scale.state()
    draws = drawn(engine, bodies.LANGUAGES, micro, kind=Same if same else Draws)
    similarity, costs = measure(engine, draws, sketch, seed, measurement=3)
    assert engine.scale.state() == before and engine.step == 0
    assert costs["seconds_gradients"] > 0 and costs["bytes_held"] > 0
    return {scope: similarity.cosines(*scope) for scope in similarity.scopes()}


def plain(settings: list[str]) -> dict[Key, np.ndarray]:
    """The same by torch's autograd on whole batches: no engine's pass, no micro-batch, torch's cross entropy."""
    from mlinterf_ds.model.encoder import SHARED, Encoder
    from mlinterf_ds.model.layers import at_positions

    engine, _, config = bodies.make(settings, "zero0", 1)
    draws = drawn(engine, bodies.LANGUAGES, micro=ROWS)
    model = Encoder(
        config.model, variant=config.routing, languages=bodies.LANGUAGES, vocabulary=bodies.Made.vocabulary_size,
        positions=config.data.sequence_length, seed=config.train.seed,
    ).eval()  # fmt: skip
    names, parameters = zip(*model.parameter_groups()[SHARED].items(), strict=True)
    flat: list[dict[str, torch.Tensor]] = []
    for language in bodies.LANGUAGES:
        for draw in range(DRAWS):
            (batch,) = draws.batches(language, draw, 3)
            assert len(batch.tokens) == ROWS
            hidden = hidden_states(model, batch)
            logits = model.head(at_positions(hidden, batch.positions), model.embeddings.word.weight)
            loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
            flat.append(dict(zip(names, torch.autograd.grad(loss, parameters), strict=True)))
    layers = [0, 1]
    parts = ("attention", "ffn", "embedding", "other")
    scopes: list[Key] = [(a, p) for a in ("all", *layers) for p in ("all", *parts)]
    cosines = {}
    for layer, part in scopes:
        scope_names = [n for n in names if part in ("all", group_of(n)[1]) and layer in ("all", group_of(n)[0])]
        if scope_names:
            rows = torch.stack([torch.cat([g[name].flatten() for name in scope_names]) for g in flat]).double()
            cosines[layer, part] = F.cosine_similarity(rows[:, None], rows[None], dim=2).numpy()
    return cosines


def trained(settings: list[str], json_name: str, tensor: int, out: str, every: int) -> list[dict[str, float]]:
    """Two steps, with a measurement before every `every`-th (0: none); the facts of every step, and a checkpoint."""
    engine, stream, config = bodies.make(settings, json_name, tensor)
    draws = drawn(engine, engine.languages, micro=4)
    meta = bodies.meta_step(engine, config, stream)
    facts = []
    for step in range(2):
        if every and step % every == 0:
            measure(engine, draws, 64 if step else "exact", 0, step)
        facts += bodies.advance(engine, stream, config, step + 1, meta)
    checkpoint.save(Path(out), engine, {}, {}, keep=9)
    return facts

"""What ranks run in the tests of exported folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mlinterf_ds.data.batch import Batch
from mlinterf_ds.data.tokenizer import Tokenizer
from mlinterf_ds.engine import checkpoint
from mlinterf_ds.engine.engine import Engine
from mlinterf_ds.engine.precision import read_deepspeed_json
from mlinterf_ds.errors import UserError
from mlinterf_ds.evaluate import Model, fill
from mlinterf_ds.model.encoder import Encoder
from mlinterf_ds.pretrain import initial, main
from mlinterf_ds.pretrain.config import load_run
from tests.parity.bodies import REPOSITORY
from tests.parity.finetune_bodies import LANGUAGES, LENGTH, RUN
from tests.ranks import joined, laid_out


def logits(place: str, tokens: list[list[int]], lengths: list[int], languages: list[int]) -> torch.Tensor:
    """Our encoder's (rows, length, vocabulary), fp32."""
    model = Model(place, laid_out(1), "fp32")
    rows = torch.tensor(tokens)
    padding = torch.arange(rows.shape[1])[None] >= torch.tensor(lengths)[:, None]
    with torch.no_grad():
        hidden = model.encoder.hidden(rows, torch.tensor(languages), sorted(set(languages)), padding)
        return model.encoder.logits(hidden)


def filled(place: str, text: str, language: str) -> list[Any]:
    """What `launch/evaluate.py --fill` shows."""
    return fill(Model(place, laid_out(1), "fp32"), text, language, 5)


def rows() -> dict[str, torch.Tensor]:
    """Four rows of both languages: tokens (4, length), positions, labels (4, 3), languages (4,)."""
    source = torch.Generator().manual_seed(1)
    return {
        "tokens": torch.randint(4, 50, (4, LENGTH), generator=source),
        "positions": torch.rand(4, LENGTH, generator=source).argsort(dim=1)[:, :3],
        "labels": torch.randint(4, 50, (4, 3), generator=source),
        "languages": torch.tensor([1, 0, 0, 1]),
    }


def started(
    place: str,
    vocabulary: str,
    settings: Sequence[str],
    json_name: str = "zero1",
    tensor: int = 1,
    out: str = "",
    languages: Sequence[str] = LANGUAGES,
    only: Sequence[str] | None = None,
) -> tuple[float, str]:
    """A run that starts from `place`: (its loss on `rows()`, "") or (0, why it was refused); saved to `out`.

    languages: the run's; only: those that it trains.
    """
    layout, tokenizer = laid_out(tensor), Tokenizer(vocabulary)
    try:
        config = load_run([], [*RUN, f"init={place}", *settings])
        model = Encoder(
            config.model,
            variant=config.routing,
            languages=languages,
            vocabulary=tokenizer.size,
            positions=LENGTH,
            seed=9,
        )
        engine = Engine(
            model, config.train, read_deepspeed_json(REPOSITORY / "ds_configs" / f"{json_name}.json"), "fp32", layout
        )
        source = initial.weights(place, config.model, tokenizer, languages, only)
        checkpoint.fill(engine, source, missing=True)
    except UserError as error:
        return 0.0, str(error)
    if out:
        state = {"config": config.model_dump(), "languages": list(languages), "vocabulary": tokenizer.size}
        state |= {"origin": source.start.origin}
        checkpoint.save(Path(out), engine, state, {"tokenizer.model": Path(vocabulary)}, 1)
    weights = torch.full((4, 3), 1 / (12 * layout.data))  # every data-parallel rank has these rows
    batch = Batch(**rows(), weights=weights, step_languages=(0, 1), dropout_seed=0)
    return engine.evaluate([batch]), ""


def pretrained(
    folder: str, settings: Sequence[str], json_name: str = "zero2", recipes: Sequence[str] = ("tiny",)
) -> Any:
    """`launch/pretrain.py`'s run in this folder: its summary."""
    os.chdir(folder)
    deepspeed = read_deepspeed_json(REPOSITORY / f"ds_configs/{json_name}.json")
    return main.run(load_run(recipes, list(settings)), deepspeed, joined())

"""What every rank of a parity test runs: a tiny model on a made corpus, at any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlinterf_ds.data.stream import TrainStream, ValidationStream
from mlinterf_ds.data.tokenizer import Vocabulary
from mlinterf_ds.engine import checkpoint
from mlinterf_ds.engine.engine import Engine
from mlinterf_ds.engine.meta_step import MetaStep
from mlinterf_ds.engine.optimizer import LossScale
from mlinterf_ds.engine.passes import make_fast
from mlinterf_ds.engine.precision import read_deepspeed_json
from mlinterf_ds.engine.weights import CheckpointReader
from mlinterf_ds.pretrain.config import RunConfig, load_run
from mlinterf_ds.runtime.parallel import ModelParallelUnit
from tests.ranks import joined, laid_out

REPOSITORY = Path(__file__).resolve().parents[2]
LANGUAGES = ("te", "as", "en")  # two of them occur inside names of modules
TINY = ["model.layers=2", "model.heads=4", "model.width=32", "model.ffn=64", "data.sequence_length=16"]
TINY += ["train.batch=8", "train.lr=0.01", "train.warmup=2", "model.dropout=0", "model.attention_dropout=0"]
TINY += ["train.precision=fp32", "train.steps=6"]


class Made:
    """A corpus in memory: each language has its own bigrams."""

    vocabulary_size = 90
    vocabulary = Vocabulary(vocabulary_size)

    def __init__(self, languages: tuple[str, ...] = LANGUAGES):
        self.languages = list(languages)

    def sentences(self, lang: str, split: str) -> int:
        return 100 * (1 + self.languages.index(lang))

    def characters(self, lang: str, split: str) -> int:
        return 4 * 2000

    def tokens(self, lang: str, split: str) -> np.ndarray:
        random = np.random.default_rng([ord(letter) for letter in lang + split])
        tokens = 5 + (np.cumsum(random.integers(1, 4, 2000)) % (self.vocabulary_size - 5))
        tokens[9::10] = 2
        return tokens.astype(np.int64)

    def unchanged(self, language: str, split: str) -> bool:
        return True

    def starts_document(self, language: str, split: str, offsets: np.ndarray) -> np.ndarray:
        return offsets % 20 == 0  # documents of two sentences


def make(
    settings: list[str],
    json_name: str = "zero1",
    tensor: int = 1,
    languages: tuple[str, ...] = LANGUAGES,
    bucket: int | None = None,
    freeze: str = "none",
) -> Any:
    """(engine, stream, config) on the ranks that run this; bucket: elements DeepSpeed reduces at once; freeze: train.freeze,
    which the configuration grants only to a run that starts from a model."""
    from mlinterf_ds.model.encoder import Encoder

    layout = laid_out(tensor)
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # this CPU is slow at it, which a tiny model does not feel
    config = load_run([], [*TINY, f"parallel.tensor={tensor}", *settings])
    corpus = Made(languages)
    stream = TrainStream(
        corpus,
        languages,
        rows=config.train.batch,
        row_format=config.data.row_format,
        seed=config.train.seed,
        mixed=config.data.mixed,
    )
    model = Encoder(
        config.model,
        variant=config.routing,
        languages=languages,
        vocabulary=corpus.vocabulary_size,
        positions=config.data.sequence_length,
        seed=config.train.seed,
    )
    deepspeed_json = read_deepspeed_json(REPOSITORY / "ds_configs" / f"{json_name}.json")
    if bucket:
        deepspeed_json["zero_optimization"] |= {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
        if json_name == "zero3":  # weights are gathered ahead only as far as this
            deepspeed_json["zero_optimization"] |= {
                "stage3_prefetch_bucket_size": bucket,
                "stage3_max_live_parameters": bucket,
            }
    training = config.train.model_copy(update={"freeze": freeze})
    engine = Engine(model, training, deepspeed_json, config.train.precision, layout)
    make_fast(engine, config.model.compile, config.train.graphs, True)
    return engine, stream, config


def advance(
    engine: Engine, stream: TrainStream, config: RunConfig, until: int, meta: MetaStep | None = None
) -> list[dict[str, float]]:
    """Trains up to step `until`, by meta steps where `meta` is given; returns the facts of every step."""
    if meta:
        return advance_meta(engine, stream, config, meta, until)
    facts = []
    while engine.step < until:
        slices = engine.slices(config.train.batch)
        facts.append(dict(engine.train_step([stream.batch(engine.step, *slice_) for slice_ in slices])))
    return facts


def train(
    settings: list[str], json_name: str, tensor: int, out: str, steps: int = 4, save_at: int = 0
) -> list[dict[str, float]]:
    """Trains `steps` steps, and saves after the last of them or after `save_at`; the facts of every step."""
    engine, stream, config = make(settings, json_name, tensor)
    meta = meta_step(engine, config, stream)
    facts = advance(engine, stream, config, save_at or steps, meta)
    checkpoint.save(Path(out), engine, {"radius": meta and meta.radius.radius}, {}, keep=9)
    return facts + advance(engine, stream, config, steps, meta)


def resumed(settings: list[str], json_name: str, tensor: int, source: str, steps: int) -> list[dict[str, float]]:
    """Continues from a checkpoint that `train` saved, up to `steps`; the facts of every step."""
    engine, stream, config = make(settings, json_name, tensor)
    meta = meta_step(engine, config, stream)
    radius = checkpoint.load(Path(source), engine)["radius"]
    if meta:
        meta.radius.radius = radius
    return advance(engine, stream, config, steps, meta)


def meta_step(engine: Engine, config: RunConfig, stream: TrainStream) -> MetaStep | None:
    return MetaStep(engine, config.meta, stream.together) if config.variant.startswith("meta_") else None


def weights(folder: str | Path, kind: str = "master") -> dict[str, torch.Tensor]:
    """Every parameter of a checkpoint, whole."""
    reader = CheckpointReader(Path(folder))
    return {name: reader.whole(name, kind) for name in reader.names}


def train_fp16(out: str, steps: int, source: str | None = None) -> tuple[list[dict[str, float]], list[float]]:
    """fp16 from a scale that overflows, with a window so short that it grows again; (facts, scales after each step)."""
    settings = ["variant=adpt", "train.precision=fp16", "model.dropout=0.1"]
    engine, stream, config = make(settings, "zero2")
    engine.scale = LossScale(True, {"initial_scale_power": 24, "hysteresis": 1, "loss_scale_window": 3})
    if source:
        checkpoint.load(Path(source), engine)
    facts, scales = [], []
    while engine.step < steps:
        facts += advance(engine, stream, config, engine.step + 1)
        scales.append(engine.scale.value)
    checkpoint.save(Path(out), engine, {}, {}, keep=9)
    return facts, scales


def validation_stream(stream: TrainStream, config: RunConfig) -> ValidationStream:
    """The rows of the validation loss of meta steps."""
    return ValidationStream(
        Made(stream.languages),
        stream.languages,
        rows=config.meta.batch or config.train.batch,
        row_format=config.data.row_format,
        seed=config.train.seed,
        languages_per_step=config.meta.languages_per_step,
    )


def advance_meta(
    engine: Engine, stream: TrainStream, config: RunConfig, meta: MetaStep, until: int
) -> list[dict[str, float]]:
    """Meta steps up to step `until`; their facts."""
    validation, facts = validation_stream(stream, config), []
    while engine.step < until:
        train = [stream.batch(engine.step, *slice_) for slice_ in engine.slices(config.train.batch)]
        language = stream.language(engine.step)
        held_out = [validation.batch(engine.step, language, *slice_) for slice_ in engine.slices(validation.rows)]
        facts.append(dict(meta.step(train, held_out)))
    return facts


def train_while_saving(settings: list[str], json_name: str, out: str) -> None:
    """Saves step 2 while a third step runs, then step 3 at once; with `checkpoint.save`, step 2 under out/at_once, too."""
    engine, stream, config = make(settings, json_name)
    advance(engine, stream, config, 2)
    checkpoint.save(Path(out) / "at_once", engine, {}, {}, keep=9)
    with checkpoint.Saver(Path(out), keep=9) as saver:
        saver.begin(engine, {}, {})
        advance(engine, stream, config, 3)
        saver.begin(engine, {}, {})


def groups(sizes: tuple[int, ...]) -> list[list[int]]:
    """The ranks of every group that this rank is in, over layouts of these tensor-parallel sizes."""
    for tensor in sizes:
        assert laid_out(tensor).tensor == tensor
        assert torch.distributed.get_world_size(ModelParallelUnit.get_tensor_model_parallel_group()) == tensor
    rank, known = torch.distributed.get_rank(), joined()._groups
    assert all(torch.distributed.get_process_group_ranks(known[key]) == list(key) for key in known if rank in key)
    return sorted(list(key) for key in known if rank in key)

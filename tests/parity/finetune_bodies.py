"""What every rank of a fine-tuning parity test runs: a tiny pretrained model, tiny task files, any layout."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mlinterf_ds.config import load_config
from mlinterf_ds.data.tokenizer import Tokenizer
from mlinterf_ds.engine import checkpoint
from mlinterf_ds.engine.engine import Engine
from mlinterf_ds.engine.precision import read_deepspeed_json
from mlinterf_ds.finetune.config import FinetuneConfig
from mlinterf_ds.finetune.main import prepare
from mlinterf_ds.finetune.trial import Trial
from mlinterf_ds.pretrain.config import load_run
from mlinterf_ds.pretrained import Point
from mlinterf_ds.runtime.signals import Signals
from mlinterf_ds.tracking import Tracker
from tests.parity.bodies import REPOSITORY
from tests.ranks import laid_out
from tests.vocabulary import learned

LANGUAGES = ("te", "as")  # both occur inside names of modules
LENGTH = 24
SHAPE = ["model.layers=1", "model.heads=2", "model.width=16", "model.ffn=32", "model.adapter=4"]
RUN = [f"data.sequence_length={LENGTH}", "train.batch=4", "train.precision=fp32"]
SHAPE += RUN
FINETUNE = [
    "finetune.epochs=3",
    "finetune.batch=4",
    "finetune.lr=0.02",
    "train.precision=fp32",
    "tracking.enabled=false",
]
FINETUNE += ["finetune.head_lr=0.05"]
WORDS = [a + b + c for a in "bdgk" for b in "aeo" for c in ("", "n", "s")]
KINDS = {"a": "B-PER", "e": "B-LOC", "o": "O"}  # the second letter tells the tag: learnable


def write_vocabulary(out: Path, alphabet: str = "") -> None:
    """A vocabulary of 50 pieces learnt from WORDS, or from words of other letters."""
    draw, words = random.Random(0), [a + b for a in alphabet for b in alphabet] or WORDS
    learned([" ".join(draw.choice(words) for _ in range(6)) + " . ?" for _ in range(300)], 50, out)


def pretrain(
    out: str,
    variant: str = "adpt",
    settings: Sequence[str] = (),
    json_name: str = "zero0",
    tensor: int = 1,
    noise: float = 0.0,
) -> None:
    """A checkpoint of an untrained model, with the vocabulary of the folder or one learnt from WORDS; noise: on biases and norms."""
    from mlinterf_ds.model.encoder import Encoder

    layout = laid_out(tensor)
    folder = Path(out)
    if layout.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "tokenizer.model").exists():
            write_vocabulary(folder / "tokenizer.model")
    dist.barrier()
    size = Tokenizer(folder / "tokenizer.model").size
    config = load_run([], [*SHAPE, f"variant={variant}", *settings])
    model = Encoder(
        config.model, variant=config.routing, languages=LANGUAGES, vocabulary=size, positions=LENGTH, seed=0
    )
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            if parameter.ndim == 1:
                parameter += noise * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    engine = Engine(
        model, config.train, read_deepspeed_json(REPOSITORY / "ds_configs" / f"{json_name}.json"), "fp32", layout
    )
    state = {"config": config.model_dump(), "languages": list(LANGUAGES), "vocabulary": size, "run_id": None}
    checkpoint.save(folder, engine, state, {"tokenizer.model": folder / "tokenizer.model"}, 1)


def write_data(folder: Path) -> None:
    """Tiny files of all four tasks in both languages."""
    import json

    folder.mkdir(parents=True, exist_ok=True)
    for language in LANGUAGES:
        draw = random.Random(language)
        sentences = [[draw.choice(WORDS) for _ in range(draw.randint(2, 9))] for _ in range(22)]
        tags = [[KINDS[word[1]] for word in words] for words in sentences]
        upos = {"B-PER": "PROPN", "B-LOC": "NOUN", "O": "VERB"}
        blocks = {
            "ner": "\n\n".join(
                "\n".join(f"{w}\t{t}" for w, t in zip(*pair, strict=True)) for pair in zip(sentences, tags, strict=True)
            ),
            "pos": "\n\n".join(
                "\n".join(f"{w} {upos[t]}" for w, t in zip(*pair, strict=True))
                for pair in zip(sentences, tags, strict=True)
            ),
            "nli": "\n".join(
                f"{' '.join(words)}\t{words[0]}\t{draw.choice(['entailment', 'neutral', 'contradiction'])}"
                for words in sentences
            ),
        }
        for task, text in blocks.items():
            (folder / f"{task}-{language}").write_text(text + "\n")
        paragraphs = []
        for n, words in enumerate(sentences):
            context, word = " ".join(words * 3), words[-1]
            answer = {"text": word, "answer_start": context.index(word)}
            paragraphs.append({"context": context, "qas": [{"id": str(n), "question": words[0], "answers": [answer]}]})
        (folder / f"qa-{language}").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))


def make(
    task: str, pretrained: str, data: str, out: str, settings: list[str], json_name: str, tensor: int, seed: int = 0
) -> Trial:
    """A fine-tuning of `te` that is tested on both languages."""
    layout = laid_out(tensor)
    own = [f"checkpoint={pretrained}", f"task={task}", f"parallel.tensor={tensor}"]
    config = load_config(FinetuneConfig, [], [*FINETUNE, *own, *settings])
    files = {language: f"{data}/{task}-{language}" for language in LANGUAGES}
    options = {"train": {"te": files["te"]}, "dev": {"te": "split"}, "test": files}
    job = prepare(
        config,
        options,
        read_deepspeed_json(REPOSITORY / "ds_configs" / f"{json_name}.json"),
        config.train.precision,
        layout,
    )
    section = config.finetune
    assert section.head_lr is not None
    return Trial(job, Point(seed, section.batch[0], section.lr[0], section.head_lr[0]), Path(out), Tracker.off())


def finetune(
    task: str, pretrained: str, data: str, out: str, settings: list[str], json_name: str, tensor: int
) -> dict[str, Any]:
    """Train to the end; (on rank 0) what it predicts of the test sets with the best epoch's weights, and its progress."""
    finetuning = make(task, pretrained, data, out, settings, json_name, tensor)
    progress = vars(finetuning.train(Signals()))
    finetuning.load_best()
    return {
        "progress": progress,
        "predictions": {language: finetuning.predict("test", language) for language in LANGUAGES},
    }


def stop_after(
    task: str, pretrained: str, data: str, out: str, settings: list[str], json_name: str, tensor: int, steps: int
) -> None:
    """Train `steps` steps and stop as a signal makes a run stop."""
    from mlinterf_ds.finetune.trial import Stopped

    finetuning = make(task, pretrained, data, out, settings, json_name, tensor)
    signals = Signals()
    train_step = finetuning.engine.train_step

    def count(*arguments: Any) -> Mapping[str, float]:
        facts = train_step(*arguments)
        if finetuning.engine.step == steps:
            signals.received = "SIGTERM"
        return facts

    finetuning.engine.train_step = count  # type: ignore[method-assign]
    try:
        finetuning.train(signals)
    except Stopped:
        return
    raise AssertionError("it was not stopped")

"""Fine-tuning and evaluation under a user's mistakes and damaged files: refused in words, nothing lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests import commands
from tests.commands import call
from tests.parity import finetune_bodies as bodies
from tests.ranks import pool


def refusal(task: str, model: Path, data: Path, out: Path, settings: list[str]) -> str:
    """The message with which preparing a fine-tuning is refused."""
    return commands.refusal(bodies.make, task, str(model), str(data), str(out), settings, "zero1", 1)


def refused(
    ground: Path, words: list[str], task: str = "ner", model: Path | None = None, data: Path | None = None, settings=()
):
    (message,) = pool(1).run(
        refusal, task, model or ground / "model", data or ground / "data", ground / "out", list(settings)
    )
    for word in words:
        assert word in message, message
    assert not (ground / "out").exists()


@pytest.mark.parametrize(
    "settings, words",
    [
        (["finetune.max_length=32"], ["finetune.max_length=32", "24 positions"]),
        (["finetune.batch=6", "finetune.micro_batch=4"], ["finetune.batch=6", "micro_batch=4"]),
        (["finetune.unseen=xx", "finetune.limit=4"], ["finetune.unseen=xx", "it knows te, as"]),
        (["checkpoint=/nowhere"], ["/nowhere", "no checkpoint here"]),
    ],
)
def test_settings_that_do_not_fit(ground: Path, settings: list[str], words: list[str]) -> None:
    refused(ground, words, settings=settings)


def test_a_test_language_with_a_new_entity_type(ground: Path, tmp_path: Path) -> None:
    shutil.copytree(ground / "data", tmp_path / "data")
    path = tmp_path / "data" / "ner-as"
    lines = path.read_text().split("\n")
    lines[1] = lines[1].split("\t")[0] + "\tB-MISC"
    path.write_text("\n".join(lines))
    refused(ground, [f"{path}, line 2", "'B-MISC'", "B-PER"], data=tmp_path / "data")


def noted(model: Path, data: Path) -> list[str]:
    """What preparing says of the sets: trained on `te`, tested on a file of `as`."""
    from mlinterf_ds.config import load_config
    from mlinterf_ds.finetune.config import FinetuneConfig
    from mlinterf_ds.finetune.main import prepare
    from tests.ranks import laid_out

    config = load_config(FinetuneConfig, [], [*bodies.FINETUNE, f"checkpoint={model}", "task=ner"])
    options = {"train": {"te": str(data / "ner-te")}, "dev": {"te": "split"}, "test": {"as": str(data / "strange")}}
    return prepare(config, options, {}, "fp32", laid_out(1)).sets.notes


def test_words_that_the_vocabulary_lacks_are_noted(ground: Path, tmp_path: Path) -> None:
    shutil.copytree(ground / "data", tmp_path / "data")
    (tmp_path / "data" / "strange").write_text("ሰላም\tO\nለዓለም\tB-PER\n")
    (notes,) = pool(1).run(noted, ground / "model", tmp_path / "data")
    assert [note for note in notes if "<unk>" in note] == [
        "test as: 33% of the pieces are <unk>, not in the vocabulary"
    ]


@pytest.mark.parametrize("task, text", [("ner", ""), ("pos", "\n\n"), ("qa", ""), ("nli", " \n")])
def test_an_empty_file(ground: Path, task: str, text: str, tmp_path: Path) -> None:
    shutil.copytree(ground / "data", tmp_path / "data")
    (tmp_path / "data" / f"{task}-te").write_text(text)
    refused(ground, [f"{task}-te", "empty"], task=task, data=tmp_path / "data")


def test_a_damaged_and_a_fine_tuned_checkpoint(ground: Path, tmp_path: Path) -> None:
    shutil.copytree(ground / "model", tmp_path / "model")
    (shard,) = tmp_path.glob("model/checkpoints/*/shard-*")
    content = shard.read_bytes()
    shard.write_bytes(content[:-5])
    refused(ground, [str(shard), "truncated"], model=tmp_path / "model")
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(ground, [str(shard), "altered"], model=tmp_path / "model")
    inputs, done = [str(ground / "model"), str(ground / "data")], tmp_path / "done"
    pool(1).run(bodies.finetune, "ner", *inputs, str(done), ["finetune.epochs=1"], "zero1", 1)
    assert json.loads((done / "result.json").read_text())["best_epoch"] == 1
    refused(ground, ["a checkpoint of a fine-tuning", "pretraining run"], model=done)
    message = refused_evaluation("--checkpoint", str(done), "--fill", "<mask>", "--language", "te")
    assert "a checkpoint of a fine-tuning" in message


def test_a_lost_checkpoint_is_named_and_the_one_before_still_resumes(ground: Path, tmp_path: Path) -> None:
    """A fine-tuning killed while saving leaves a partial folder; a truncated newest checkpoint is refused by name."""
    keep = ["finetune.keep=5"]
    inputs = [str(ground / "model"), str(ground / "data")]
    whole = pool(1).run(bodies.finetune, "ner", *inputs, str(tmp_path / "a"), keep, "zero1", 1)[0]
    pool(1).run(bodies.stop_after, "ner", *inputs, str(tmp_path / "b"), keep, "zero1", 1, 7)
    newest = sorted((tmp_path / "b" / "checkpoints").glob("step-*"))[-1]
    shutil.copytree(newest, newest.with_name("step-00000009.partial"))
    (newest / "complete.json").unlink()
    with pytest.raises(AssertionError, match="not a checkpoint of mlinterf_ds.*the one before it is.*step-00000005"):
        pool(1).run(bodies.finetune, "ner", *inputs, str(tmp_path / "b"), keep, "zero1", 1)
    shutil.rmtree(newest)
    rest = pool(1).run(bodies.finetune, "ner", *inputs, str(tmp_path / "b"), keep, "zero1", 1)[0]
    assert rest == whole


def refused_evaluation(*words: str) -> str:
    """The message with which `evaluate` refuses these arguments on a rank of the pool."""
    return pool(1).run(call, "evaluate", "/", words)[0]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--text", "te=nofile"], "nofile: cannot be read"),
        (["--text", "xx=nofile"], "knows te, as"),
        (["--fill", "a <mask>", "--language", "xx"], "knows te, as"),
        (["--fill", "a <mask>"], "knows te, as"),
        (["--fill", "a", "--language", "te"], "has no <mask>"),
        (["--fill", "bak " * 99 + "<mask>", "--language", "te"], "the model reads 24 at once: shorten the text"),
        (["--text", "te=blank"], "blank: no sentence in it"),
        ([], "give either --text"),
        (["--fill", "a", "--text", "te=f"], "give either --text"),
    ],
)
def test_evaluation_refuses(ground: Path, arguments: list[str], words: str) -> None:
    if "te=blank" in arguments:
        (ground / "blank").write_text("\u200b\n\n")
        arguments = ["--text", f"te={ground}/blank"]
    assert words in refused_evaluation("--checkpoint", str(ground / "model"), *arguments)

"""A corpus altered under a run, or before it: nothing is learned from other text than was prepared, and the run says why."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlinterf_ds.data.corpus import Corpus
from mlinterf_ds.data.evaluation import EvaluationSet
from mlinterf_ds.data.prepare.main import prepare
from mlinterf_ds.data.stream import TrainStream, ValidationStream
from mlinterf_ds.errors import UserError
from mlinterf_ds.sections import RowFormat
from tests.commands import arguments, call
from tests.faults import kill_many
from tests.faults.test_run_faults import wait_for
from tests.ranks import pool
from tests.unit.test_corpus import some_lines, written


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    files: dict[str, Any] = {
        code: [written(tmp_path / code, some_lines(400, n))] for n, code in enumerate(("en", "sw"))
    }
    prepare(files, tmp_path / "out", meta_split=True, vocabulary_size=80, workers=1)
    return tmp_path / "out"


def streams(folder: Path) -> dict[str, Callable[[int], Any]]:
    """Batches by the split they are made of."""
    corpus = Corpus.open(folder)
    train = TrainStream(corpus, ["en", "sw"], rows=8, row_format=RowFormat(16), seed=0, mixed=True)
    meta = ValidationStream(corpus, ["en", "sw"], rows=8, row_format=RowFormat(16), seed=0)
    valid = EvaluationSet(corpus, "en", "valid", languages=["en", "sw"], row_format=RowFormat(16))
    return {"train": train.batch, "meta": lambda step: meta.batch(step, 0), "valid": lambda step: valid.batch(0, 4)}


def flipped(path: Path) -> None:
    with path.open("r+b") as file:  # in place: a mapping of the file sees it
        file.seek(100)
        byte = file.read(1)[0]
        file.seek(100)
        file.write(bytes([byte ^ 1]))


def cut(path: Path) -> None:
    """To nothing: to touch what is mapped of it would be SIGBUS."""
    os.truncate(path, 0)


def exchanged(path: Path) -> None:
    """Another file of the same size under the name."""
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[::-1])


@pytest.mark.parametrize("split", ["train", "meta", "valid"])
@pytest.mark.parametrize(
    "alter, why",
    [(flipped, "contents are not those"), (cut, "has 0 bytes"), (exchanged, "contents"), (Path.unlink, "is missing")],
)
def test_no_batch_is_made_of_altered_text(folder: Path, split: str, alter: Callable[[Path], Any], why: str) -> None:
    made = streams(folder)
    for batch in made.values():
        batch(0)
    alter(folder / f"en.{split}.bin")
    for _ in range(2):  # nor later
        with pytest.raises(UserError, match=rf"{folder}/en.{split}.bin: .*{why}.*; copy the corpus again"):
            made[split](1)
    for other in made.keys() - {split}:
        made[other](1)


def test_the_tokenizer_is_part_of_the_text(folder: Path) -> None:
    made = streams(folder)
    flipped(folder / "tokenizer.model")
    with pytest.raises(UserError, match=r"tokenizer.model: its contents are not those"):
        made["train"](0)


def test_what_was_only_touched_copied_or_put_back_goes_on_with_the_same_batches(folder: Path) -> None:
    made, path = streams(folder), folder / "en.train.bin"
    truth = [made["train"](step).tokens.numpy() for step in range(4)]
    os.utime(path)
    assert np.array_equal(made["train"](0).tokens, truth[0])
    shutil.copy(path, path.with_suffix(".copy"))
    os.replace(path.with_suffix(".copy"), path)
    assert np.array_equal(made["train"](1).tokens, truth[1])
    path.chmod(0o600)
    assert np.array_equal(made["train"](2).tokens, truth[2])
    flipped(path)
    flipped(path)
    assert np.array_equal(made["train"](3).tokens, truth[3])


def test_text_altered_and_put_right_while_it_was_read_is_read_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the looks before and after, `at` once sees other tokens: the rows it returns are the right ones."""
    from mlinterf_ds.data.windows import Windows

    path, corpus = folder / "en.train.bin", Corpus.open(folder)
    tokens = np.array(corpus.tokens("en", "train"))
    looks: list[bool] = []

    def unchanged() -> bool:
        if len(looks) == 1:
            windows.tokens = tokens.copy()  # as it is again
        looks.append(corpus.unchanged("en", "train"))
        if len(looks) == 1:
            windows.tokens = np.zeros_like(tokens)  # what a writer left for a moment
            os.utime(path)
        return looks[-1]

    windows = Windows(tokens, 8, 1, unchanged=unchanged)
    assert np.array_equal(windows.at(np.array([0, 40]))[0], [tokens[0:8], tokens[40:48]])
    assert looks == [True, False, True]


def test_a_run_ends_by_itself_and_does_not_start_on_such_a_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real command on two ranks: down within 90 s with file and remedy; checkpoints stay; resumed, refused by hash."""
    settings = [*kill_many.SETTINGS[1:], "train.steps=3000", "train.save_steps=1"]
    monkeypatch.setattr(kill_many, "SETTINGS", settings)
    log = tmp_path / "altered.log"
    job = kill_many.start(tmp_path, "altered", restarts=0)
    try:
        wait_for(job, log, lambda: (tmp_path / "altered/checkpoints/step-00000002").is_dir(), 300)
        (folder,) = (tmp_path / "corpora").glob("synthetic-*+*")
        for path in folder.glob("*.train.bin"):
            flipped(path)
        assert job.wait(timeout=90) != 0
        said = log.read_text()
        assert ".train.bin: its contents are not those that were prepared" in said and "copy the corpus again" in said
        assert "Traceback" not in said, said[-3000:]
        assert any((tmp_path / "altered" / "checkpoints").glob("step-*"))
    finally:
        kill_many.end(job, "altered")
    words = arguments(*settings, "output=altered", "resume=auto", ds="zero2")
    for message in pool(2).run(call, "pretrain.main", str(tmp_path), words):
        assert ".train.bin: its contents are not those that were prepared" in message

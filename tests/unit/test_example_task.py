"""The architect's guide's example of a new task, sentence classification: files, rows, predictions, mistakes, baselines."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlinterf_ds.data.tokenizer import BOS, EOS
from mlinterf_ds.errors import UserError
from mlinterf_ds.tasks import Limits
from tests.examples.topic import Topic
from tests.vocabulary import learned

TASK = Topic()
LIMITS = Limits(max_length=6, stride=0, max_question=0, max_answer=0)
TRAIN = "the ball\tsport\nthe dog ran\tsport\nthe law\tpolitics\n"


def read(folder: Path, text: str) -> list:
    (folder / "f.tsv").write_text(text)
    return TASK.read(folder / "f.tsv", "en")


def test_from_a_file_to_predictions_and_back(tmp_path: Path) -> None:
    examples = read(tmp_path, TRAIN)
    labels = TASK.labels(examples)
    assert labels == ["politics", "sport"]
    tokenizer = learned(["the dog ran to the ball of the law"] * 20, 24, tmp_path / "tokenizer.model")
    rows, notes = TASK.rows(examples, tokenizer, labels, LIMITS)
    assert all(row.tokens[0] == BOS and row.tokens[-1] == EOS and len(row.tokens) <= 6 for row in rows)
    assert notes == ["3 texts are longer than 6 pieces and were cut"]
    predictions = TASK.predict(examples, rows, [row.targets for row in rows], labels, LIMITS)
    assert TASK.score(examples, predictions) == {"accuracy": 100}
    TASK.write(examples, predictions, tmp_path / "out.tsv")
    assert (tmp_path / "out.tsv").read_text() == TRAIN
    with pytest.raises(UserError, match=r"f\.tsv, line 3: label 'politics' does not occur .* has sport"):
        TASK.rows(examples, tokenizer, ["sport"], LIMITS)


@pytest.mark.parametrize("line", ["the ball", "the ball\t", "\tsport", "the\tball\tsport"])
def test_a_line_is_a_text_and_a_label(line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"f\.tsv, line 4: expected 2 columns"):
        read(tmp_path, TRAIN + line + "\n")


def test_baselines_by_hand(tmp_path: Path) -> None:
    """The word law outvotes the word the. Unknown words get the commonest label, as every text does by "majority"."""
    train, test = read(tmp_path, TRAIN), read(tmp_path, "the law\tpolitics\na cat\tsport\na bill\tpolitics\n")
    assert TASK.baselines(train, test) == {
        "majority": {"accuracy": pytest.approx(100 / 3)},
        "lexical": {"accuracy": pytest.approx(200 / 3)},
    }

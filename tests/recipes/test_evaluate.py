"""Evaluation of a checkpoint on any text: against the encoder's own losses, by hand, on one rank and two."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mlinterf_ds.errors import UserError
from tests.commands import call
from tests.mlflow_server import empty_store, runs_of
from tests.parity import finetune_bodies as bodies
from tests.ranks import laid_out, pool


@pytest.fixture(scope="module")
def ground(ground: Path) -> Path:
    """The folder of every test, with a file `text`."""
    words = bodies.WORDS
    lines = [" ".join(words[(n * k + n) % len(words)] for k in range(2 + n % 7)) + " ." for n in range(30)]
    (ground / "text").write_text("\n".join(lines) + "\n\n")
    return ground


def scored(ground: str, tensor: int) -> dict[str, Any]:
    from mlinterf_ds.evaluate import Model, score

    model = Model(f"{ground}/model", laid_out(tensor), "fp32")
    return score(model, "as", Path(ground) / "text", 6)


def by_hand(ground: str) -> tuple[float, list[float]]:
    """(pseudo-perplexity of the first six lines, chances of the first piece of `fill`) with plain loops."""
    from mlinterf_ds.evaluate import Model, fill

    model = Model(f"{ground}/model", laid_out(1), "fp32")
    total, count = 0.0, 0
    with torch.no_grad():
        for line in (Path(ground) / "text").read_text().split("\n")[:6]:
            ids = [0, *model.tokenizer.encode(line), 2]
            for place in range(1, len(ids) - 1):
                masked = torch.tensor([[*ids[:place], 4, *ids[place + 1 :]]])
                hidden = model.encoder.hidden(masked, torch.tensor([1]), (1,))
                total -= float(model.encoder.logits(hidden)[0, place].log_softmax(-1)[ids[place]])
                count += 1
        words = "bak <mask> den <mask>"
        found = fill(model, words, "as", 3)
        ids = [0, *model.tokenizer.encode("bak"), 4, *model.tokenizer.encode("den"), 4, 2]
        chances = model.encoder.logits(model.encoder.hidden(torch.tensor([ids]), torch.tensor([1]), (1,)))[0].softmax(
            -1
        )
        wanted = chances[ids.index(4)].topk(3).values.tolist()
    assert len(found) == 2 and [c["probability"] for c in found[0]] == pytest.approx(wanted)
    assert all(c["piece"] in model.tokenizer.pieces for c in found[1])
    return math.exp(total / count), wanted


def test_pseudo_perplexity_and_fill_by_hand(ground: Path) -> None:
    ((wanted, _),) = pool(1).run(by_hand, str(ground))
    (found,) = pool(1).run(scored, str(ground), 1)
    assert found["pseudo_perplexity"] == pytest.approx(wanted, rel=1e-5)
    assert found["sentences"] == 30
    # an untrained model knows nothing: about as many choices as there are pieces
    assert 10 < found["perplexity"] < 500


def cut(ground: str) -> tuple[dict[str, Any], str]:
    from mlinterf_ds.evaluate import Model, _shown, score

    model = Model(f"{ground}/model", laid_out(1), "fp32")
    found = score(model, "as", Path(ground) / "long", 2)
    return found, _shown({"as": found})


def test_sentences_longer_than_a_row_are_counted_and_said(ground: Path) -> None:
    (ground / "long").write_text(" ".join(["bak den"] * 200) + "\nbak den\n")
    ((found, shown),) = pool(1).run(cut, str(ground))
    assert found["pseudo_perplexity_sentences_cut"] == 1 and "the beginning of 1 sentences of as" in shown


def grown(ground: str, tensor: int, old: int) -> tuple[float, float, dict[str, Any], str]:
    """(perplexity and share of the old pieces with plain logits, what `score` says of both, what is shown)."""
    from mlinterf_ds.data.evaluation import EvaluationSet
    from mlinterf_ds.evaluate import Model, Text, _shown, score

    model = Model(f"{ground}/model", laid_out(tensor), "fp32")
    model.saved["old_pieces"] = old
    found = score(model, "as", Path(ground) / "text", 0)
    text = Text(Path(ground) / "text", "as", model.tokenizer)
    rows = EvaluationSet(text, "as", "test", languages=model.languages, row_format=model.row_format)
    sums = [0.0, 0.0, 0.0]
    with torch.no_grad():
        for batch in rows.batches(8):
            where = {"segment_ids": batch.segment_ids, "position_ids": batch.position_ids}
            hidden = model.encoder.hidden(batch.tokens, batch.languages, batch.step_languages, **where)
            for row, columns in enumerate(batch.positions):
                for number, column in enumerate(columns):
                    if not batch.weights[row, number]:  # a row that only fills the batch
                        continue
                    label = int(batch.labels[row, number])
                    sums[2] += 1
                    if label < old and tensor == 1:
                        chances = model.encoder.logits(hidden[row : row + 1])[0, column, :old].log_softmax(-1)
                        sums[0] -= float(chances[label])
                    sums[1] += label < old
    return math.exp(sums[0] / sums[1]), sums[1] / sums[2], found, _shown({"as": found})


def test_perplexity_among_the_pieces_of_the_model_that_was_extended(ground: Path) -> None:
    ((perplexity, share, found, shown),) = pool(1).run(grown, str(ground), 1, 40)
    assert 0.2 < share < 1 and found["old_pieces"] == pytest.approx(share, rel=1e-6)
    assert found["old_pieces_perplexity"] == pytest.approx(perplexity, rel=1e-5)
    assert f"perplexity {perplexity:.2f} among the pieces of the model that this one extends" in shown
    for *_, sharded, _ in pool(2).run(grown, str(ground), 2, 40):
        assert sharded == pytest.approx(found, rel=1e-5)


def strange(ground: str) -> tuple[dict[str, Any], str]:
    from mlinterf_ds.evaluate import Model, _shown, score

    found = score(Model(f"{ground}/model", laid_out(1), "fp32"), "as", Path(ground) / "strange", 0)
    return found, _shown({"as": found})


def test_text_that_the_vocabulary_lacks_is_said(ground: Path) -> None:
    (ground / "strange").write_text("ሰላም ለዓለም\n")
    ((found, shown),) = pool(1).run(strange, str(ground))
    assert found["unknown"] == pytest.approx(2 / 5)  # a piece of space and one <unk> a word, and </s>
    assert "note: 40% of the pieces of as are <unk>" in shown
    ((found, shown),) = pool(1).run(cut, str(ground))
    assert found["unknown"] == 0 and "<unk>" not in shown


@pytest.mark.parametrize("tensor", [1, 2])
def test_two_ranks_equal_one(ground: Path, tensor: int) -> None:
    (wanted,) = pool(1).run(scored, str(ground), 1)
    for found in pool(2).run(scored, str(ground), tensor):
        assert found == pytest.approx(wanted, rel=1e-5)


def test_the_command_writes_what_it_shows(ground: Path, tmp_path: Path) -> None:
    arguments = ["--checkpoint", str(ground / "model"), "--text", f"te={ground}/text", "--text", f"as={ground}/text"]
    assert pool(1).run(
        call, "evaluate", "/", [*arguments, "--sentences", "2", "--out", str(tmp_path / "out.json")]
    ) == [""]
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found) == {"te", "as"} and found["te"]["pseudo_perplexity_tokens"] > 2
    assert found["te"]["perplexity"] != found["as"]["perplexity"]  # each has its own adapters


@pytest.mark.parametrize(
    "words, said",
    [
        (["--tensor", "0"], "--tensor: '0': expected a whole number, 1 or more"),
        (["--sentences", "-5"], "--sentences: '-5': expected a whole number, 0 or more"),
        (["--top", "x"], "--top: 'x': expected a whole number, 1 or more"),
    ],
)
def test_numbers_that_mean_nothing(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    from mlinterf_ds.evaluate import main

    with pytest.raises(SystemExit):
        main(["--checkpoint", "x", "--text", "as=x", *words])
    assert said in capsys.readouterr().err


def test_results_that_could_not_be_written_are_not_computed(tmp_path: Path) -> None:
    from mlinterf_ds.evaluate import main

    with pytest.raises(UserError, match=r"--out .*no/x: there is no folder .*no"):
        main(["--checkpoint", "x", "--text", "as=x", "--out", str(tmp_path / "no/x")])


def test_scores_are_recorded_under_the_pretraining_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    from mlinterf_ds.evaluate import record

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    (tmp_path / "mlflow.db").write_bytes(empty_store())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    client = MlflowClient(uri)
    parent = client.create_run(client.create_experiment("study")).info.run_id
    config = {"variant": "adpt", "tracking": {"enabled": True, "experiment": "study"}}
    model: Any = SimpleNamespace(path=tmp_path / "model", saved={"run_id": parent, "config": config})
    (tmp_path / "text").write_text("Habari ya asubuhi")
    record(model, {"sw": "text"}, {"sw": {"perplexity": 3.5, "sentences": 2}})
    (found,) = runs_of(client, "study-analyses")
    assert found.data.tags["mlflow.parentRunId"] == parent and found.info.status == "FINISHED"
    assert found.data.metrics == {"evaluate/perplexity/sw": 3.5, "evaluate/sentences/sw": 2}

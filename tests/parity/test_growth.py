"""Languages added to a trained model: old pieces, rows and modules bit-identical, new ones trained, at any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mlinterf_ds.data.corpus import Corpus
from mlinterf_ds.data.prepare.main import prepare
from mlinterf_ds.engine.space import Segment
from mlinterf_ds.errors import UserError
from mlinterf_ds.pretrain.config import load_run
from mlinterf_ds.pretrain.initial import LANGUAGE_ROWS
from mlinterf_ds.pretrain.initial import weights as initial_weights
from tests.parity.bodies import weights
from tests.parity.export_bodies import pretrained
from tests.ranks import pool
from tests.unit.test_corpus import some_lines, written

WORDS, BIAS = "embeddings.word.weight", "head.bias"
SETTINGS = ["variant=adpt", "train.batch=8", "data.eval_rows=4", "model.width=32", "model.ffn=64", "model.dropout=0"]
SETTINGS += ["model.attention_dropout=0", "tracking.enabled=false", "train.precision=fp32", "data.sequence_length=16"]
SETTINGS += ["train.lr=0.01", "train.warmup=0"]
GROWN = [*SETTINGS, "corpus=new", "init=first", "train.freeze=shared", "data.only=yo", "train.steps=3", "train.seed=1"]
OLD, NEW = 60, 100  # pieces


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An old corpus and a model of it, and a corpus that extends it by a language."""
    folder = tmp_path_factory.mktemp("growth")
    files: dict[str, Any] = {
        "en": [written(folder / "en.txt", some_lines(300))],
        "sw": [written(folder / "sw.txt", some_lines(300, 1, "ba da ko mi su la"))],
        "yo": [written(folder / "yo.txt", some_lines(300, 2, "за ко ли ми ту"))],
    }
    old = {code: files[code] for code in ("en", "sw")}
    prepare(old, folder / "old", vocabulary_size=OLD, workers=1)
    prepare(files, folder / "new", vocabulary_size=NEW, extends=folder / "old", workers=1)
    pool(2).run(pretrained, str(folder), [*SETTINGS, "corpus=old", "output=first", "train.steps=3"], "zero1")
    return folder


def test_old_pieces_keep_their_ids_and_cut_old_text_as_before(ground: Path) -> None:
    old, new = (Corpus.open(ground / name).tokenizer for name in ("old", "new"))
    assert (old.size, new.size) == (OLD, NEW) and new.pieces[:OLD] == old.pieces and len(set(new.pieces)) == NEW
    for code in ("en", "sw"):  # the new language's script is its own: no new piece matches
        lines = (ground / f"{code}.txt").read_text().splitlines()
        assert [new.encode(line) for line in lines] == [old.encode(line) for line in lines]
    lines = (ground / "yo.txt").read_text().splitlines()
    assert [new.decode(new.encode(line)) for line in lines] == lines and old.decode(old.encode(lines[0])) != lines[0]
    used = {number for line in lines for number in new.encode(line)}
    assert len(used - set(range(OLD))) > 10, "new pieces are reached by merging"


def test_a_new_script_is_known_whole_before_its_characters_are_joined(ground: Path) -> None:
    """SentencePiece lists single characters last: cut off, the new language's words would be unknown."""
    thai = "กขคงจฉชซฌญฎฏฐฑฒณดตถทธนบปผฝพฟภมยรลวศษสหฬอฮ"
    words = " ".join(thai[k : k + 3] for k in range(len(thai) - 2))
    file = written(ground / "th.txt", some_lines(300, 3, words))
    old = Corpus.open(ground / "old").tokenizer
    lacking = len({c for c in file.read_text() if not c.isspace()} - set(old.pieces))
    corpus = prepare({"th": [file]}, ground / "thai", vocabulary_size=OLD + lacking, extends=ground / "old", workers=1)
    assert 3 not in {number for line in file.read_text().splitlines() for number in corpus.tokenizer.encode(line)}
    with pytest.raises(
        UserError, match=rf"the new text has {lacking} characters that .* lacks; ask for {OLD + lacking} or more"
    ):
        prepare({"th": [file]}, ground / "no", vocabulary_size=OLD + lacking - 1, extends=ground / "old", workers=1)


def test_vocabularies_that_cannot_be_extended_so(ground: Path) -> None:
    files: dict[str, Any] = {"yo": [ground / "yo.txt"]}
    with pytest.raises(UserError, match=rf"--vocab-size {OLD}: must be more than the {OLD} pieces"):
        prepare(files, ground / "no", vocabulary_size=OLD, extends=ground / "old", workers=1)
    with pytest.raises(
        UserError, match=r"--vocab-size 9000: the new text has \d+ pieces .* lacks; ask for (\d+) or fewer"
    ):
        prepare(files, ground / "no", vocabulary_size=9000, extends=ground / "old", workers=1)


@pytest.mark.parametrize("tensor", [1, 2])
def test_new_rows_start_at_the_mean_and_old_ones_as_saved(ground: Path, tensor: int) -> None:
    initial = initial_weights(
        str(ground / "first"), load_run(["tiny"], SETTINGS).model, Corpus.open(ground / "new").tokenizer, ["en"]
    )
    saved = weights(initial.source.path)
    for name in (WORDS, BIAS):
        shape = (128 // tensor, *saved[name].shape[1:])  # padded to a multiple of 64
        numel = torch.Size(shape).numel()
        parts = [
            initial.read(Segment(name, shape, 0, numel, 0, 0, 0), "master", tensor, rank).view(shape)
            for rank in range(tensor)
        ]
        whole = torch.cat(parts)
        assert torch.equal(whole[:OLD], saved[name][:OLD])
        mean = saved[name][5:OLD].mean(0, dtype=torch.float64).float()
        assert torch.equal(whole[OLD:NEW], mean.expand(NEW - OLD, *shape[1:]))


def test_language_embeddings_are_taken_by_language(ground: Path) -> None:
    """In another order, with a new one (the mean), by a model without any (zero); and never dropped in silence."""
    settings = [*SETTINGS, "model.language_embeddings=true"]
    pool(1).run(pretrained, str(ground), [*settings, "corpus=old", "output=with", "train.steps=2"], "zero1")
    tokenizer, model = Corpus.open(ground / "old").tokenizer, load_run(["tiny"], settings).model

    def rows(place: str, codes: list[str]) -> torch.Tensor:
        shape = (len(codes), model.width)
        wanted = Segment(LANGUAGE_ROWS, shape, 0, len(codes) * model.width, 0, 0, None)
        return (
            initial_weights(str(ground / place), model, tokenizer, codes, ["yo"])
            .read(wanted, "master", 1, 0)
            .view(shape)
        )

    saved = weights(sorted((ground / "with/checkpoints").glob("step-*"))[-1])[LANGUAGE_ROWS]
    assert torch.equal(rows("with", ["sw", "yo", "en"]), torch.stack([saved[1], saved.mean(0), saved[0]]))
    assert torch.equal(rows("first", ["sw", "en"]), torch.zeros(2, model.width))
    with pytest.raises(UserError, match="its model has language_embeddings=True"):
        initial_weights(str(ground / "with"), load_run(["tiny"], SETTINGS).model, tokenizer, ["en", "sw"])


def last(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    return weights(newest), weights(newest, "exp_avg")


@pytest.fixture(scope="module")
def reference(ground: Path) -> dict[str, torch.Tensor]:
    """The grown model after three steps on one rank, without ZeRO."""
    pool(1).run(pretrained, str(ground), [*GROWN, "output=alone"], "zero0")
    return last(ground / "alone")[0]


@pytest.mark.parametrize("json_name, tensor", [("zero1", 1), ("zero2", 2), ("zero2", 1), ("zero3", 1), ("zero3", 2)])
def test_frozen_but_for_the_new_language(
    ground: Path, reference: dict[str, torch.Tensor], json_name: str, tensor: int
) -> None:
    output = f"{json_name}-{tensor}"
    settings = [*GROWN, f"parallel.tensor={tensor}", f"output={output}"]
    pool(2).run(pretrained, str(ground), settings, json_name)
    before, (after, moments) = last(ground / "first")[0], last(ground / output)
    assert before.keys() < after.keys() and all("language_yo" in name for name in after.keys() - before.keys())
    for name in before:  # theta, and the modules of en and sw
        if name in (WORDS, BIAS):
            assert torch.equal(after[name][:OLD], before[name][:OLD]) and not moments[name][:OLD].any()
            assert (after[name][OLD:NEW] != after[name][OLD:NEW].mean(0)).any() and moments[name][OLD:NEW].any()
        else:
            assert torch.equal(after[name], before[name]) and not moments[name].any(), name
    assert all(moments[name].any() for name in after.keys() - before.keys()), "every part of the new modules is trained"
    assert after.keys() == reference.keys()
    differ = {name: (after[name] - reference[name]).abs().max().item() for name in after}
    assert max(differ.values()) < 2e-5, f"the layout decides nothing: {differ}"
    pool(2).run(pretrained, str(ground), [*settings, "resume=auto", "train.steps=4"], json_name)
    again, _ = last(ground / output)
    assert torch.equal(again[WORDS][:OLD], before[WORDS][:OLD]) and (again[WORDS] != after[WORDS]).any()


AT_ONCE = ["meta.order=simultaneous", "meta.reuse=true"]


@pytest.mark.parametrize(
    "settings", [[], AT_ONCE, [*AT_ONCE, "data.mixed=true"]], ids=["in turn", "at once", "languages mixed"]
)
@pytest.mark.parametrize("grown", [True, False])
def test_the_meta_step_trains_modules_on_a_frozen_encoder(ground: Path, settings: list[str], grown: bool) -> None:
    """The lookahead moves the shared parameters, the step does not; new rows are trained all the same. Modules of languages
    that `data.only` leaves out stay, though the validation rows are of all languages."""
    output = f"meta-{len(settings)}-{grown}"
    corpus = ["corpus=new"] if grown else ["corpus=old", "data.only=sw"]
    run = [*GROWN, *corpus, *settings, "variant=meta_adpt", "train.steps=2", "meta.batch=8", f"output={output}"]
    pool(1).run(pretrained, str(ground), run, "zero1")
    before, after = last(ground / "first")[0], last(ground / output)[0]
    trained = "language_yo" if grown else "language_sw"
    for name in after:
        if trained in name:
            assert name not in before or not torch.equal(after[name], before[name]), name
        elif grown and name in (WORDS, BIAS):
            assert torch.equal(after[name][:OLD], before[name][:OLD])
            assert (after[name][OLD:NEW] != after[name][OLD:NEW].mean(0)).any()
        else:
            assert torch.equal(after[name], before[name]), name


def test_not_frozen_all_that_is_shared_trains_and_old_modules_stay(ground: Path) -> None:
    pool(2).run(pretrained, str(ground), [*GROWN, "train.freeze=none", "output=free"], "zero1")
    before, (after, _) = last(ground / "first")[0], last(ground / "free")
    for name in before:
        kept = torch.equal(
            after[name][: len(before[name])] if name not in (WORDS, BIAS) else after[name][:OLD],
            before[name][:OLD] if name in (WORDS, BIAS) else before[name],
        )
        assert kept == ("language_" in name), name


def test_what_cannot_be_done_is_refused(ground: Path) -> None:
    for settings, words in (
        (["variant=meta_adpt", "meta.every=2"], "set meta.every=1 or meta.between=plain"),
        (["variant=joint"], "variant=ffn, attn or adpt"),
        (["init=none"], "a model that init= names"),
    ):
        with pytest.raises(UserError, match=words):
            load_run([], [*GROWN, *settings])
    with pytest.raises(AssertionError, match=r"data.only = yo,xx: expected one or more of en, sw, yo"):
        pool(1).run(pretrained, str(ground), [*GROWN, "data.only=yo,xx", "output=no"], "zero1")
    prepare({"en": [ground / "en.txt"]}, ground / "other", vocabulary_size=55, workers=1)
    with pytest.raises(UserError, match=r"its vocabulary is not that of .*--extend its corpus"):
        initial_weights(
            str(ground / "first"),
            load_run(["tiny"], SETTINGS).model,
            Corpus.open(ground / "other").tokenizer,
            ["en"],
        )

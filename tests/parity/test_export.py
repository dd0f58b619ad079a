"""Exported folders against the encoder that they come from, and runs that start from them, at several layouts."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mlinterf_ds.data.corpus import SYNTHETIC_LANGUAGES
from mlinterf_ds.data.foreign import vocabulary_file
from mlinterf_ds.data.prepare.synthetic import prepare_synthetic
from mlinterf_ds.data.tokenizer import Tokenizer
from mlinterf_ds.errors import UserError
from mlinterf_ds.export import card
from mlinterf_ds.export.hf import export
from mlinterf_ds.pretrained import Pretrained
from tests.parity import export_bodies as bodies
from tests.parity import finetune_bodies
from tests.parity.bodies import REPOSITORY
from tests.parity.test_foreign_tokenizer import make
from tests.ranks import pool
from tests.unit.test_tokenizer import some_text

transformers = pytest.importorskip("transformers")
import mlinterf_ds.export.modeling_mlinterf  # noqa: E402, F401  (registers its classes)

# name: (variant, settings, DeepSpeed's JSON, ranks, tensor-parallel ranks)
CASES: dict[str, tuple[str, list[str], str, int, int]] = {
    "joint": ("joint", [], "zero3", 2, 1),
    "wide": ("joint", ["model.head_width=12"], "zero0", 1, 1),  # heads wider than the model, as the paper's 12 x 64
    "share_adpt": ("share_adpt", ["model.adapter_activation=relu"], "zero1", 2, 2),
    "meta_adpt": ("meta_adpt", [], "zero3", 2, 2),
    "ffn": ("ffn", ["model.language_embeddings=true"], "zero2", 2, 1),
    "attn": ("attn", ["model.position_kind=rotary"], "zero1", 2, 2),
}
STOCK = ["joint"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """The checkpoint of a case and the folder exported from it, each made once."""
    folder = tmp_path_factory.mktemp("exports")

    @functools.cache
    def make(case: str) -> tuple[Path, Path]:
        variant, settings, json_name, ranks, tensor = CASES[case]
        run, exported = folder / case, folder / f"{case}-exported"
        pool(ranks).run(finetune_bodies.pretrain, str(run), variant, settings, json_name, tensor, 0.3)
        export(str(run), exported)
        return run, exported

    return make


def loaded(folder: Path) -> Any:
    model, facts = transformers.AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not any(facts.values()), facts  # nothing missing, nothing left over
    return model.eval()


def languages(case: str, numbers: list[int]) -> dict[str, Any]:
    """The arguments that name the rows' languages."""
    return {} if case in STOCK else {"language": [finetune_bodies.LANGUAGES[number] for number in numbers]}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_our_encoder(made, case: str) -> None:
    checkpoint, folder = made(case)
    model = loaded(folder)
    assert type(model).__name__ == ("XLMRobertaXLForMaskedLM" if case in STOCK else "MLInterfForMaskedLM")
    tokens, lengths, numbers = bodies.rows()["tokens"], [24, 9, 1, 17], [1, 0, 1, 1]
    mask = torch.arange(24)[None] < torch.tensor(lengths)[:, None]
    tokens = torch.where(mask, tokens, 1)
    (wanted,) = pool(1).run(bodies.logits, str(checkpoint), tokens.tolist(), lengths, numbers)
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask.long(), **languages(case, numbers)).logits
    torch.testing.assert_close(logits[mask], wanted[mask], rtol=0, atol=1e-5)
    assert wanted[mask].std() > 0.1  # not all alike


@pytest.mark.parametrize("kind, stock", [("wordpiece", "XLMRobertaXLForMaskedLM"), ("unigram", "MLInterfForMaskedLM")])
def test_a_vocabulary_that_pads_with_another_id(made, tmp_path: Path, monkeypatch, kind: str, stock: str) -> None:
    """Stock classes count positions from the padding id on: [PAD] is 0, and <pad> behind all pieces has a class of ours."""
    make(kind, tmp_path / "vocabulary", iter(some_text()), 300)
    (tmp_path / "tokenizer.model").write_bytes(vocabulary_file(tmp_path / "vocabulary"))
    foreign = Tokenizer(tmp_path / "tokenizer.model")
    monkeypatch.setattr(Pretrained, "tokenizer", lambda _: foreign)
    checkpoint, _ = made("joint")
    export(str(checkpoint), tmp_path / "out")
    model, pad = loaded(tmp_path / "out"), foreign.vocabulary.pad
    assert type(model).__name__ == stock and model.config.pad_token_id == pad
    tokens = bodies.rows()["tokens"].clamp(min=1)
    (wanted,) = pool(1).run(bodies.logits, str(checkpoint), tokens.tolist(), [24] * 4, [0] * 4)
    named = {} if stock.startswith("XLM") else {"language": [finetune_bodies.LANGUAGES[0]] * 4}
    with torch.no_grad():
        logits = model(tokens, attention_mask=torch.ones_like(tokens), **named).logits
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5)


def test_padding_on_the_left_and_a_default_language(made) -> None:
    model, row = loaded(made("ffn")[1]), torch.tensor([[0, 20, 30, 4, 2]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        wanted = model(row, language="as").logits
        padded = model(torch.cat([torch.tensor([[1, 1]]), row], 1), attention_mask=mask, language=["as"]).logits[:, 2:]
        model.set_default_language("as")
        torch.testing.assert_close(model(row).logits, wanted, rtol=0, atol=0)
    torch.testing.assert_close(padded, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("given", [None, "xx", ["te"], ["te", "xx"]])
def test_a_language_that_is_missing_or_unknown(made, given: Any) -> None:
    model = loaded(made("meta_adpt")[1])
    with pytest.raises(ValueError, match="te, as|2 rows"):
        model(torch.tensor([[0, 2], [0, 2]]), language=given)


@pytest.mark.parametrize("case", ["joint", "meta_adpt"])
@pytest.mark.parametrize("language", [0, 1])
@pytest.mark.parametrize("text", ["bak <mask> den <mask>", "<mask>des  gob."])
def test_masks_are_filled_as_by_our_own_command(made, case: str, language: int, text: str) -> None:
    checkpoint, folder = made(case)
    (wanted,) = pool(1).run(bodies.filled, str(checkpoint), text, ("te", "as")[language])
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(folder), loaded(folder)
    encoded = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        chances = model(**encoded, **languages(case, [language])).logits[encoded.input_ids == tokenizer.mask_token_id]
    values, best = chances.softmax(-1).topk(5)
    assert len(wanted) == len(best) == text.count("<mask>")
    for mask, candidates in enumerate(wanted):
        assert tokenizer.convert_ids_to_tokens(best[mask]) == [candidate["piece"] for candidate in candidates]
        assert values[mask].tolist() == pytest.approx([c["probability"] for c in candidates], abs=1e-6)


@pytest.mark.parametrize("case", ["joint", "meta_adpt"])
@pytest.mark.parametrize("layout", [("zero0", 1, 1), ("zero2", 2, 1), ("zero3", 2, 1), ("zero1", 2, 2)], ids=str)
def test_a_run_starts_from_the_folder_and_exports_the_same_bits(made, case, layout, tmp_path: Path) -> None:
    json_name, ranks, tensor = layout
    folder, settings = made(case)[1], [f"variant={CASES[case][0]}"]
    model = loaded(folder)
    model.save_pretrained(tmp_path / "resaved")  # transformers' own copy, with the tokenizer, starts a run too
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "resaved")
    vocabulary, resaved = str(folder / "sentencepiece.model"), str(tmp_path / "resaved")
    losses = pool(ranks).run(bodies.started, resaved, vocabulary, settings, json_name, tensor, str(tmp_path / "run"))
    batch = bodies.rows()
    labels = torch.full_like(batch["tokens"], -100).scatter(1, batch["positions"], batch["labels"])
    with torch.no_grad():
        wanted = model(batch["tokens"], labels=labels, **languages(case, batch["languages"].tolist())).loss.item()
    for loss, refusal in losses:
        assert not refusal and loss == pytest.approx(wanted, rel=1e-5)
    export(str(tmp_path / "run"), tmp_path / "again")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert (folder / "config.json").read_text() == (tmp_path / "again" / "config.json").read_text()
    assert (folder / "tokenizer.json").read_bytes() == (tmp_path / "again" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    "case, variant", [("joint", v) for v in ("adpt", "share_adpt", "ffn", "attn")] + [("share_adpt", "meta_adpt")]
)
@pytest.mark.parametrize("exported", [False, True])
def test_added_language_modules_leave_the_loss(made, case: str, variant: str, exported: bool) -> None:
    checkpoint, folder = made(case)
    vocabulary, settings = str(folder / "sentencepiece.model"), CASES[case][1]
    source = str(folder if exported else checkpoint)
    ((wanted, _),) = pool(1).run(bodies.started, source, vocabulary, [f"variant={case}", *settings])
    ((loss, refusal),) = pool(1).run(bodies.started, source, vocabulary, [f"variant={variant}", *settings])
    assert not refusal and loss == pytest.approx(wanted, rel=1e-6)


WITHOUT_US = """
import sys
sys.modules |= dict.fromkeys(["deepspeed", "megatron", "mlinterf_ds"])
import torch, transformers
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = transformers.AutoModelForMaskedLM.from_pretrained(sys.argv[1], trust_remote_code=True)
encoder, facts = transformers.AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)
tokens = tokenizer("bak <mask>", return_tensors="pt")
with torch.no_grad():
    scored = model(**tokens, language="as", output_hidden_states=True)
    assert torch.equal(encoder(**tokens, language="as").last_hidden_state, scored.hidden_states[-1])
assert not facts["missing_keys"] and not facts["unexpected_keys"], facts
fill = transformers.pipeline("fill-mask", sys.argv[1], trust_remote_code=True)
best = {language: fill("bak <mask>", language=language)[0]["score"] for language in ("as", "te")}
assert abs(best["as"] - scored.logits[tokens.input_ids == tokenizer.mask_token_id].softmax(-1).max().item()) < 1e-6
assert abs(best["as"] - best["te"]) > 1e-6
fill.model.set_default_language("te")
assert fill("bak <mask>")[0]["score"] == best["te"]
features = transformers.pipeline("feature-extraction", sys.argv[1], trust_remote_code=True)
assert torch.allclose(torch.tensor(features("bak <mask>", language="as")), scored.hidden_states[-1])
print(scored.logits.sum().item())
"""
WITHOUT_ENGINES = """
import sys
sys.modules |= dict.fromkeys(["deepspeed", "megatron"])
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
import mlinterf_ds.export.modeling_mlinterf
"""


def test_exporting_needs_no_engine_and_loading_needs_none_of_our_code(made, tmp_path: Path) -> None:
    checkpoint, folder = made("meta_adpt")
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(REPOSITORY)

    def python(*arguments: str) -> str:
        done = subprocess.run([sys.executable, "-c", *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    out = tmp_path / "out"
    printed = python(WITHOUT_ENGINES, str(REPOSITORY / "tools/export_hf.py"), str(checkpoint), str(out))
    assert "MLInterfForMaskedLM" in printed
    assert (out / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        wanted = loaded(folder)(**tokenizer("bak <mask>", return_tensors="pt"), language="as").logits.sum().item()
    assert float(python(WITHOUT_US, str(out))) == pytest.approx(wanted, abs=1e-3)


def altered(folder: Path, copy: Path, name: str, change: Callable[[bytes], bytes]) -> Path:
    """A copy of the folder with one file changed."""
    shutil.copytree(folder, copy)
    (copy / name).write_bytes(change((copy / name).read_bytes()))
    return copy


def flipped(old: bytes) -> bytes:
    """One bit of the last byte changed."""
    return old[:-1] + bytes([old[-1] ^ 1])


def swapped(old: bytes) -> bytes:
    """Two pieces of a tokenizer.json in each other's place."""
    content = json.loads(old)
    vocabulary = content["model"]["vocab"]
    ninth, tenth = (piece for number in (9, 10) for piece in vocabulary if vocabulary[piece] == number)
    vocabulary[ninth], vocabulary[tenth] = 10, 9
    return json.dumps(content).encode()


def edit(**changes: Any) -> Callable[[bytes], bytes]:
    return lambda old: json.dumps(json.loads(old) | changes).encode()


@pytest.mark.parametrize(
    "file, change, listed, words",
    [
        ("model.safetensors", flipped, True, ["altered", "sha256", "export it again"]),
        ("model.safetensors", lambda old: old[:-9], True, ["truncated"]),
        ("model.safetensors", lambda old: old[:-9], False, ["safetensors", "copy it again"]),
        ("config.json", edit(num_attention_heads=4), False, ["heads=4", "model.heads=2"]),
        ("config.json", edit(model_type="gpt2"), False, ["'gpt2'", "mlinterf"]),
        ("config.json", edit(hidden_act="relu"), False, ["hidden_act", "'relu'", "'gelu'"]),
        (
            "config.json",
            edit(adapter_activation="tanh"),
            False,
            ["adapter_activation=tanh", "model.adapter_activation=gelu"],
        ),
        ("config.json", edit(position_kind="rotary"), False, ["position_kind=rotary", "model.position_kind=learned"]),
        ("config.json", edit(vocab_size=51), False, ["50 pieces", "51"]),
        ("tokenizer.json", swapped, False, ["vocabulary", "piece 9 is", "--tokenizer"]),
        ("tokenizer.json", lambda old: old[:-9], False, ["tokenizer.json", "not a tokenizer"]),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(made, tmp_path: Path, file, change, listed: bool, words) -> None:
    folder = made("meta_adpt")[1]
    copy = altered(folder, tmp_path / "copy", file, change)
    if not listed:
        (copy / "export.json").unlink()
    vocabulary = str(folder / "sentencepiece.model")
    settings = ["variant=meta_adpt", "model.heads=2", "model.adapter_activation=gelu", "model.position_kind=learned"]
    ((_, refusal),) = pool(1).run(bodies.started, str(copy), vocabulary, settings)
    for word in words:
        assert word in refusal
    ((_, refusal),) = pool(1).run(bodies.started, str(folder), vocabulary, ["variant=ffn"])
    assert not refusal  # the folder itself is as it was: its feed-forward layers serve every language


def test_what_cannot_be_exported(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, folder = made("meta_adpt")
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(UserError, match=r"is not empty; nothing was written"):
        export(str(checkpoint), folder)
    assert sorted(path.name for path in folder.iterdir()) == before
    with pytest.raises(UserError, match="no checkpoint here"):
        export(str(tmp_path), tmp_path / "out")
    whole = next((checkpoint / "checkpoints").glob("step-*"))
    shard = "shard-00001.safetensors"
    broken = altered(whole, tmp_path / whole.name, shard, flipped)
    with pytest.raises(UserError, match=rf"{shard}: altered"):
        export(str(broken), tmp_path / "out")
    tuned = altered(whole, tmp_path / "x" / whole.name, "run.json", edit(config={"task": "ner"}))
    (tuned / "complete.json").write_text('{"format": 1, "files": {}}')
    with pytest.raises(UserError, match="of a fine-tuning"):
        export(str(tuned), tmp_path / "out")
    monkeypatch.setattr(card, "VARIANTS", {"joint": "all languages share all parameters"})
    with pytest.raises(UserError, match="variant adpt cannot be exported"):
        export(str(whole), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".export-*"))


def test_pretraining_goes_on_from_an_exported_run(tmp_path: Path) -> None:
    prepare_synthetic(SYNTHETIC_LANGUAGES, 300, folder=tmp_path / "corpus")
    settings = ["corpus=corpus", "train.steps=2", "train.batch=8", "data.eval_rows=8", "model.width=32", "model.ffn=64"]
    settings += ["tracking.enabled=false"]
    (before,) = pool(1).run(bodies.pretrained, str(tmp_path), [*settings, "output=first"])
    export(str(tmp_path / "first"), tmp_path / "folder")
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "meta_adpt" in card and all(
        f"| {code} | {ppl:.2f} | " in card for code, ppl in before["valid_perplexity"].items()
    )
    settings += ["output=second", "init=folder", "variant=adpt", "train.seed=3"]
    pool(1).run(bodies.pretrained, str(tmp_path), settings)
    state = json.loads(next((tmp_path / "second/checkpoints").glob("step-*/run.json")).read_text())
    assert {code: points[0] for code, points in state["history"].items()} == {
        code: [0, value] for code, value in before["valid_perplexity"].items()
    }
    shutil.rmtree(tmp_path / "folder")  # a run that goes on doesn't need what it started from
    (after,) = pool(1).run(bodies.pretrained, str(tmp_path), [*settings, "resume=auto", "train.steps=3"])
    assert after["steps"] == 3

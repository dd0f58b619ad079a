"""Models of `transformers` in our encoder and back: hidden states, logits, weights, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import _disable_current_modes

from mlinterf_ds.data.prepare.main import prepare
from mlinterf_ds.data.tokenizer import Tokenizer, Vocabulary
from mlinterf_ds.engine import checkpoint
from mlinterf_ds.engine.space import Segment
from mlinterf_ds.errors import UserError
from mlinterf_ds.export import folder as reading
from mlinterf_ds.export import tokenizer as tokenizer_files
from mlinterf_ds.export.classes import OURS
from mlinterf_ds.export.folder import Folder
from mlinterf_ds.export.hf import export
from mlinterf_ds.model.encoder import Encoder, partition_dim
from mlinterf_ds.pretrain import initial
from mlinterf_ds.pretrain.config import load_run
from mlinterf_ds.pretrained import filled
from mlinterf_ds.runtime.parallel import Layout
from mlinterf_ds.sections import ModelConfig
from tests.memory import Alive
from tests.parity import export_bodies as bodies
from tests.parity import finetune_bodies
from tests.parity.test_foreign_tokenizer import make
from tests.ranks import pool
from tests.unit.test_corpus import some_lines

transformers = pytest.importorskip("transformers")
import mlinterf_ds.export.modeling_mlinterf  # noqa: E402, F401  (registers its classes)

VOCABULARY, LENGTH, CODES = 50, 24, ("te", "as", "zh_cn")  # ours; X-MOD calls them te_IN, as_XX, zh_CN
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": LENGTH + 2,
}  # fmt: skip
XMOD: dict[str, Any] = {"languages": ["te_IN", "as_XX", "zh_CN"], "default_language": "as_XX"}
# name: (class, settings, whether adapters stand in it)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "xlm-roberta": ("XLMRoberta", {"type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "roberta": ("Roberta", {"type_vocab_size": 2}),
    "camembert": ("Camembert", {"type_vocab_size": 1}),
    "xlm-roberta-xl": ("XLMRobertaXL", {"type_vocab_size": 1}),
    "bert": ("Bert", {"max_position_embeddings": LENGTH + 5, "layer_norm_eps": 1e-3}),
    "xmod": ("Xmod", XMOD),
    "mad-x": ("Xmod", XMOD | {"ln_before_adapter": False, "adapter_reduction_factor": 4}),
    "xmod-pre": ("Xmod", XMOD | {"pre_norm": True, "adapter_layer_norm": True}),
    "xmod-plain": ("Xmod", XMOD | {"adapter_reuse_layer_norm": False}),
}


def made(case: str, path: Path, dtype: torch.dtype = torch.float32, **saving: Any) -> Any:
    """A stock model whose parameters are all far from their defaults, saved to `path` without a tokenizer."""
    name, settings = CASES[case]
    config = getattr(transformers, f"{name}Config")(**SHAPE | settings)
    model = getattr(transformers, f"{name}ForMaskedLM")(config).to(dtype).eval()
    source = torch.Generator().manual_seed(len(case))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in parameter_name.lower() and parameter_name.endswith("weight") else 0.0
            parameter.copy_(centre + torch.randn(parameter.shape, generator=source) * 0.3)
    model.save_pretrained(path, **saving)
    return model


def with_tokenizer(path: Path) -> Path:
    """The vocabulary of a new checkpoint of ours; its tokenizer is saved to the model folder `path`."""
    finetune_bodies.write_vocabulary(path / "tokenizer.model")
    tokenizer_files.write(Tokenizer(path / "tokenizer.model"), path, LENGTH)
    return path / "tokenizer.model"


def ours(folder: Folder, dtype: torch.dtype = torch.float32) -> Encoder:
    model = Encoder(
        ModelConfig(**folder.keys), variant=folder.variant, languages=CODES, vocabulary=VOCABULARY, positions=LENGTH
    )
    return filled(model, folder, Layout(0, 1, 1)).to(dtype).eval()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("case", CASES)
def test_hidden_states_and_logits(case: str, dtype: torch.dtype, error: float, tmp_path: Path) -> None:
    """On rows of three languages, mixed, some of them padded."""
    theirs = made(case, tmp_path).to(dtype)
    encoder = ours(Folder(tmp_path, CODES), dtype)
    tokens = torch.randint(4, VOCABULARY, (5, LENGTH), generator=torch.Generator().manual_seed(1))
    padding = torch.arange(LENGTH)[None] >= torch.tensor([24, 9, 24, 1, 17])[:, None]
    tokens, numbers = torch.where(padding, 1, tokens), torch.tensor([2, 0, 1, 0, 2])
    named = {"lang_ids": numbers} if CASES[case][0] == "Xmod" else {}
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=(~padding).long(), output_hidden_states=True, **named)
        hidden = encoder.hidden(tokens, numbers, (0, 1, 2), padding)
        logits = encoder.head(hidden, encoder.embeddings.word.weight)[..., :VOCABULARY]
    assert expected.logits[~padding].std() > 0.1
    torch.testing.assert_close(hidden[~padding], expected.hidden_states[-1][~padding], rtol=error, atol=error)
    torch.testing.assert_close(logits[~padding], expected.logits[~padding], rtol=error, atol=10 * error)


@pytest.mark.parametrize("case", ["xlm-roberta", "bert", "xlm-roberta-xl", "xmod", "xmod-pre"])
@pytest.mark.parametrize("layout", [("zero0", 1, 1), ("zero3", 2, 1), ("zero1", 2, 2)], ids=str)
def test_what_comes_in_goes_out_untrained(case: str, layout: tuple[str, int, int], tmp_path: Path) -> None:
    """The loss is transformers' at every layout, and each tensor of the exported folder is the given one."""
    json_name, ranks, tensor = layout
    folder = tmp_path / "in"
    theirs = made(case, folder, max_shard_size="4KB")  # several files
    assert (folder / "model.safetensors.index.json").is_file()
    vocabulary, xmod = with_tokenizer(folder), CASES[case][0] == "Xmod"
    settings = [f"variant={'adpt' if xmod else 'joint'}"]
    (loss, refusal), *_ = pool(ranks).run(
        bodies.started, str(folder), str(vocabulary), settings, json_name, tensor, str(tmp_path / "run"), CODES
    )
    batch = bodies.rows()
    labels = torch.full_like(batch["tokens"], -100).scatter(1, batch["positions"], batch["labels"])
    named = {"lang_ids": batch["languages"]} if xmod else {}
    with torch.no_grad():
        assert not refusal and loss == pytest.approx(
            theirs(batch["tokens"], labels=labels, **named).loss.item(), rel=1e-5
        )
    export(str(tmp_path / "run"), tmp_path / "out")
    again = load_file(tmp_path / "out" / "model.safetensors")
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert type(loaded) is type(theirs)
    before, after = theirs.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    tied = {
        "lm_head.decoder.weight",
        "lm_head.decoder.bias",
        "cls.predictions.decoder.weight",
        "cls.predictions.decoder.bias",
    }
    assert again.keys() == before.keys() - tied
    for key in ("layer_norm_eps", "type_vocab_size", "max_position_embeddings", "pad_token_id", "languages"):
        assert getattr(loaded.config, key, None) == getattr(theirs.config, key, None), key


def test_a_language_is_added_to_an_xmod(tmp_path: Path) -> None:
    """A new language's adapters add nothing; the folder that goes out has all four, for stock X-MOD."""
    theirs = made("xmod", tmp_path / "in")
    vocabulary, codes = with_tokenizer(tmp_path / "in"), (*CODES, "yo")
    arguments = (str(tmp_path / "in"), str(vocabulary), ["variant=adpt"], "zero1", 1, str(tmp_path / "run"), codes)
    ((_, refusal),) = pool(1).run(bodies.started, *arguments)
    assert "no modules of yo; it has te, as, zh_cn" in refusal and "data.only" in refusal
    ((_, refusal),) = pool(1).run(bodies.started, *arguments, ["yo"])
    assert not refusal
    export(str(tmp_path / "run"), tmp_path / "out")
    loaded = transformers.XmodForMaskedLM.from_pretrained(tmp_path / "out").eval()
    assert loaded.config.languages == ["te_IN", "as_XX", "zh_CN", "yo"]
    tokens = bodies.rows()["tokens"]
    with torch.no_grad():
        for number in range(3):
            wanted = theirs(tokens, lang_ids=torch.full((4,), number)).logits
            assert torch.equal(loaded(tokens, lang_ids=torch.full((4,), number)).logits, wanted)
        (again,) = pool(1).run(bodies.logits, str(tmp_path / "run"), tokens.tolist(), [LENGTH] * 4, [3, 0, 3, 1])
        new = loaded(tokens, lang_ids=torch.tensor([3, 0, 3, 1])).logits
    torch.testing.assert_close(again, new, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind, vocabulary", [("Roberta", "bytes"), ("Bert", "wordpiece")])
def test_a_run_from_a_folder_with_its_own_vocabulary(kind: str, vocabulary: str, tmp_path: Path) -> None:
    """A corpus in the folder's vocabulary, a run whose steps move nothing, and out: the same model and tokenizer."""
    lines = {
        code: [*some_lines(300, seed, words)]
        for seed, (code, words) in enumerate({"te": "ba da ko", "as": "mi su la"}.items())
    }
    before = make(vocabulary, tmp_path / "in", (line for text in lines.values() for line in text), 300)
    shape = SHAPE | {
        "vocab_size": len(before),
        "pad_token_id": before.pad_token_id,
        "bos_token_id": before.cls_token_id,
    }
    config = getattr(transformers, f"{kind}Config")(**shape, eos_token_id=before.sep_token_id)
    theirs = getattr(transformers, f"{kind}ForMaskedLM")(config).eval()
    theirs.save_pretrained(tmp_path / "in")
    for code, text in lines.items():
        (tmp_path / f"{code}.txt").write_text("\n".join(text))
    prepare(
        {code: [tmp_path / f"{code}.txt"] for code in lines}, tmp_path / "corpus", tokenizer=tmp_path / "in", workers=1
    )
    settings = [
        "corpus=corpus",
        "init=in",
        "output=run",
        "variant=joint",
        "train.steps=1",
        "train.lr=1e-30",
        "train.batch=4",
    ]
    settings += [
        "train.micro_batch=4",
        "train.warmup=0",
        "data.sequence_length=16",
        "data.eval_rows=4",
        "tracking.enabled=false",
    ]
    pool(1).run(bodies.pretrained, str(tmp_path), settings, "zero2", ["continue"])
    export(str(tmp_path / "run"), tmp_path / "out")
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    first, second = theirs.state_dict(), loaded.state_dict()
    assert type(loaded) is type(theirs) and first.keys() == second.keys()
    for name in first:  # biases that are 0 move by the rate
        torch.testing.assert_close(second[name], first[name], rtol=0, atol=1e-29)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in (lines["te"][0], f"{lines['as'][0]} {before.mask_token}"):
        assert again(text)["input_ids"] == before(text)["input_ids"]
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "max_position_embeddings", "type_vocab_size"):
        assert getattr(loaded.config, name) == getattr(theirs.config, name)


@pytest.mark.parametrize(
    "settings, kind",
    [
        (["variant=joint", "model.norm=post", "model.embedding_norm=true"], "xlm-roberta"),
        (["variant=joint", "model.norm=post"], OURS),
        (["variant=joint", "model.norm=post", "model.embedding_norm=true", "model.position_kind=rotary"], OURS),
        (["variant=adpt", "model.norm=post", "model.embedding_norm=true"], OURS),
        (["variant=adpt", "model.norm=post", "model.embedding_norm=true", "model.adapter_after=ffn", "model.adapter_on=sum",
          "model.adapter_norm=layer"], "xmod"),
        (["variant=adpt", "model.norm=post", "model.adapter_after=ffn", "model.adapter_on=sum", "model.adapter_norm=own",
          "model.adapter_skip=normed", "model.head_width=12", "model.position_offset=2", "model.positions=30",
          "model.token_types=1"], OURS),
        (["variant=share_adpt", "model.norm=post", "model.adapter_on=sum", "model.adapter_norm=own"], OURS),
        (["variant=attn", "model.norm=post", "model.embedding_norm=true", "model.epsilon=1e-3"], OURS),
    ],
)  # fmt: skip
def test_our_own_models_go_out_as_the_class_that_they_are(settings: list[str], kind: str, tmp_path: Path) -> None:
    """With the logits of our encoder."""
    variant, *others = settings
    pool(1).run(
        finetune_bodies.pretrain, str(tmp_path / "run"), variant.removeprefix("variant="), others, "zero0", 1, 0.3
    )
    export(str(tmp_path / "run"), tmp_path / "out")
    model, facts = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert model.config.model_type == kind and not any(facts.values()), facts
    tokens, numbers = bodies.rows()["tokens"], [1, 0, 1, 1]
    named: dict[str, Any] = {"language": [finetune_bodies.LANGUAGES[number] for number in numbers]}
    if kind != OURS:
        named = {"lang_ids": torch.tensor(numbers)} if kind == "xmod" else {}
    (wanted,) = pool(1).run(bodies.logits, str(tmp_path / "run"), tokens.tolist(), [LENGTH] * 4, numbers)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(tokens, **named).logits, wanted, rtol=0, atol=1e-5)
    assert wanted.std() > 0.1
    keys = Folder(tmp_path / "out", finetune_bodies.LANGUAGES).keys
    assert (keys["norm"], keys["layers"], keys["width"]) == ("post", 1, 16)


class Copied:
    """A part of an opened file, of which every tensor that is read becomes one in memory."""

    def __init__(self, part: Any):
        self.part = part

    def __enter__(self) -> Copied:
        return self

    def __exit__(self, *error: Any) -> None:
        self.part.__exit__(*error)

    def get_slice(self, name: str) -> Copied:
        return Copied(self.part.get_slice(name))

    def get_shape(self) -> list[int]:
        return list(self.part.get_shape())

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._in_memory(lambda: self.part.get_tensor(name))

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._in_memory(lambda: self.part[index])

    def _in_memory(self, read: Callable[[], torch.Tensor]) -> torch.Tensor:
        with _disable_current_modes():
            mapped = read()
        return mapped.clone()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("pieces", [400, 430], ids=["as it is", "with new pieces"])
def test_a_rank_reads_a_folder_by_parts(pieces: int, rank: int, monkeypatch: Any, tmp_path: Path) -> None:
    """At tensor-parallel size 2, what is in memory at once is at most half of the model and its largest tensor."""
    config = transformers.XLMRobertaConfig(**SHAPE | {"vocab_size": 400, "type_vocab_size": 1})
    theirs = transformers.XLMRobertaForMaskedLM(config)
    theirs.save_pretrained(tmp_path)
    monkeypatch.setattr(reading, "ROWS", 8)
    source = Folder(tmp_path, CODES)
    monkeypatch.setattr(reading, "safe_open", lambda *path, **how: Copied(safe_open(*path, **how)))
    model = Encoder(ModelConfig(**source.keys), variant="joint", languages=CODES, vocabulary=pieces, positions=LENGTH)
    segments, offset = [], 0
    for name, parameter in model.named_parameters():
        shape, dim = list(parameter.shape), partition_dim(parameter)
        if dim is not None:
            shape[dim] //= 2
        segments.append(Segment(name, tuple(shape), 0, math.prod(shape), 0, offset, dim))
        offset += math.prod(shape)
    start = initial.Start(tmp_path, source, source.keys, [""] * 400, list(CODES), "joint")
    weights = initial.WithLanguages(start, Vocabulary(pieces), CODES)
    master = torch.full((offset,), torch.nan)
    space = SimpleNamespace(segments=segments, masters=[master], write=lambda: None)
    engine: Any = SimpleNamespace(spaces={"shared": space}, layout=Layout(rank, 2, 2))
    with Alive() as alive:
        checkpoint.fill(engine, weights)
    largest, whole = theirs.roberta.embeddings.word_embeddings.weight, sum(p.nbytes for p in theirs.parameters())
    assert not master.isnan().any() and largest.nbytes / 2 < alive.most
    assert master.nbytes + alive.most <= whole / 2 + largest.nbytes
    rows = master[: segments[0].length].view(segments[0].shape)
    own = largest.detach()[len(rows) * rank :][: len(rows)]
    assert segments[0].name == "embeddings.word.weight" and torch.equal(rows[: len(own)], own)


# -- what is refused -------------------------------------------------------------------------------------------------


def config_of(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_models_keys_are_not_those_of_the_machine_that_trained_it() -> None:
    """Whether layers are compiled or recomputed is decided by the run that starts from it."""
    saved = {"variant": "joint", "model": {"compile": False, "recompute": True}, "data": {"sequence_length": 64}}
    keys = initial._keys_of({"config": saved})
    assert "compile" not in keys and "recompute" not in keys and keys["positions"] == 64


def tensors_of(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors")


def truncated(path: Path) -> None:
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:-100])


def pickled(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


BIAS, WORDS = "roberta.encoder.layer.1.output.dense.bias", "roberta.embeddings.word_embeddings.weight"
ADAPTER = "roberta.encoder.layer.0.output.adapter_modules.te_IN.dense1.weight"
REFUSED: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "another class": (lambda path: config_of(path, model_type="gpt2"), ["'gpt2'", "xlm-roberta", "xmod", "bert"]),
    "another activation": (lambda path: config_of(path, hidden_act="relu"), ["hidden_act", "'relu'", "'gelu'"]),
    "a decoder": (lambda path: config_of(path, is_decoder=True), ["is_decoder", "True"]),
    "no layers": (lambda path: config_of(path, num_hidden_layers=0), ["shape", "layers"]),
    "truncated": (truncated, ["model.safetensors", "not a whole safetensors file", "copy it again"]),
    "a pickle": (pickled, ["pytorch_model.bin", "a pickle", "save_pretrained"]),
    "a missing tensor": (lambda path: tensors_of(path, lambda weights: weights.pop(BIAS)), ["has no parameter", BIAS]),
    "an adapter lost": (lambda path: tensors_of(path, lambda weights: weights.pop(ADAPTER)), ["has no parameter", ADAPTER]),
    "another shape": (
        lambda path: tensors_of(path, lambda weights: weights.update({BIAS: torch.zeros(5)})),
        ["linear_fc2.bias", "(5,)", "(16,)"],
    ),
    "fewer pieces": (
        lambda path: tensors_of(path, lambda weights: weights.update({WORDS: torch.zeros(49, 16)})),
        ["word_embeddings.weight has 49 rows", "vocab_size is 50"],
    ),
    "another vocabulary": (
        lambda path: finetune_bodies.write_vocabulary(path / "tokenizer.model", "pqrstu"),
        ["its vocabulary is not that of", "piece"],
    ),
    "two Chinese": (
        lambda path: config_of(path, languages=["te_IN", "as_XX", "zh_TW", "zh_CN"]),
        ["zh fits zh_TW and zh_CN"],
    ),
    "no Chinese": (lambda path: config_of(path, languages=["te_IN", "as_XX"]), ["no modules of zh", "te, as"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def xmod(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("xmod")
    made("xmod", folder)
    with_tokenizer(folder)
    return folder


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("case", REFUSED)
def test_folders_that_are_refused(case: str, xmod: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(xmod, folder)
    change, words = REFUSED[case]
    change(folder)
    with pytest.raises(UserError) as refusal:
        config = load_run([], [f"init={folder}", "variant=adpt", f"data.sequence_length={LENGTH}"])
        codes = ("te", "as", "zh")
        model = Encoder(config.model, variant="adpt", languages=codes, vocabulary=VOCABULARY, positions=LENGTH)
        source = initial.weights(str(folder), config.model, Tokenizer(folder / "tokenizer.model"), codes)
        filled(model, source, Layout(0, 1, 1))
    for word in words:
        assert word in str(refusal.value)


def test_the_shape_is_read_and_a_contradiction_named(xmod: Path) -> None:
    init = f"init={xmod}"
    model = load_run([], [init, "variant=adpt", "data.sequence_length=24"], "tiny").model
    assert (model.layers, model.width, model.norm, model.adapter_width, model.adapter_skip) == (
        2,
        16,
        "post",
        8,
        "normed",
    )
    assert (model.positions, model.position_offset, model.epsilon, model.dropout) == (LENGTH + 2, 2, 1e-12, 0.0)
    assert load_run([], [init, "model.width=16", "model.dropout=0.3", "data.sequence_length=8"]).model.dropout == 0.3
    for settings, words in (
        (["model.width=32"], "its model has width=16, this run model.width=32: leave model.width out"),
        (["model.adapter_on=output", "model.adapter_norm=none", "model.adapter_skip=sum"], "model.adapter_"),
        (["data.sequence_length=25"], r"data.sequence_length=25 is more than the model's 24 positions"),
    ):
        with pytest.raises(UserError, match=words):
            load_run([], [init, "data.sequence_length=24", *settings])
    with pytest.raises(UserError, match=r"model\.(width|layers|heads|ffn)=\d+: leave"):
        load_run(["small"], [init, "data.sequence_length=24"])  # a recipe that the user names contradicts too
    with pytest.raises(UserError, match="gone: no such folder"):
        load_run([], ["init=gone"])

"""The model card of an exported checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from mlinterf_ds.files import sha256
from mlinterf_ds.pretrained import Pretrained
from mlinterf_ds.sections import has_adapters, is_meta, is_routed

ROUTED = {
    "adpt": "each language has its own residual adapters after attention and feed-forward",
    "ffn": "each language has its own feed-forward layers",
    "attn": "each language has its own attention layers",
    "share_adpt": "all languages share one set of residual adapters",
    "mono": "the model knows one language",
    "joint": "all languages share all parameters",
}
DEPARTURES = """\
The model departs from the paper in these ways: it is pre-norm (XLM is post-norm); adapters use GELU unless stated otherwise
and stand before the residual sum, after the sublayer's dropout; the variants `ffn` and `attn` share the norms; a token
of a packed row sees its own sentence or document alone, unless `data.boundaries` is `none`; all models of a study share one
vocabulary. Perplexities of models with different vocabularies cannot be compared."""

STOCK_USE = """\
```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForMaskedLM.from_pretrained(FOLDER).eval()
logits = model(**tokenizer("... <mask> ...", return_tensors="pt")).logits
```"""
ROUTED_USE = """\
```python
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
model = AutoModelForMaskedLM.from_pretrained(FOLDER, trust_remote_code=True).eval()
tokens = tokenizer("... <mask> ...", return_tensors="pt")
logits = model(**tokens, language=CODE).logits  # or one code for each row
encoder = AutoModel.from_pretrained(FOLDER, trust_remote_code=True).eval()  # without the head
hidden = encoder(**tokens, language=CODE).last_hidden_state
fill = pipeline("fill-mask", FOLDER, trust_remote_code=True)  # "feature-extraction" takes a language too
fill("... <mask> ...", language=CODE)
model.set_default_language(CODE)  # from here on, calls need no language=
```

After `import mlinterf_ds.export.modeling_mlinterf` the two models need no `trust_remote_code=True`; pipelines always do."""


def card(pretrained: Pretrained, stock: bool) -> str:
    """The text of README.md: what the model is, how to load it, what it scores."""
    saved, variant, shape = pretrained.saved, pretrained.saved["config"]["variant"], pretrained.shape()
    languages = pretrained.languages
    head = ["---", "language:", *(f"- {json.dumps(code)}" for code in languages)]
    head += ["library_name: transformers", "pipeline_tag: fill-mask", "tags:", "- multilingual", "- mlinterf", "---"]
    how = "by the meta step (Algorithm 1 of the paper)" if is_meta(variant) else "with all other parameters"
    trained = f", trained {how}" if is_routed(variant) else ""
    adapters = (
        f", adapters of width {shape.adapter_width} ({shape.adapter_activation})" if has_adapters(variant) else ""
    )
    lines = [
        *head,
        f"# {saved['config'].get('name', 'model')}: {variant} on {', '.join(languages)}",
        "",
        "A masked language model of mlinterf_ds, a study of negative interference between languages "
        "([arXiv:2010.03017](https://arxiv.org/abs/2010.03017)).",
        "",
        f"- Variant `{variant}`: {ROUTED[pretrained.variant]}{trained}.",
        f"- {shape.layers} layers, width {shape.width}, {shape.heads} heads of width {shape.kv_channels}, feed-forward "
        f"{shape.ffn}{adapters}, a vocabulary of {saved['vocabulary']} pieces, rows of up to {pretrained.positions} pieces.",
        f"- {saved['updates']} steps, checkpoint `{pretrained.path.name}`.",
        "",
        *_scores(pretrained),
        "## Use",
        "",
        _use(stock, languages),
        "",
        "The tokenizer reads `<mask>` and the other special pieces in a text as such. It gives all other text the ids of "
        "`sentencepiece.model`, after NFC normalisation and with single spaces.",
        "",
        "## Limits and licence",
        "",
        DEPARTURES,
        "",
        _licence(pretrained),
    ]
    return "\n".join(lines) + "\n"


def _scores(pretrained: Pretrained) -> list[str]:
    """The last validation perplexity of each language before the checkpoint, as a table."""
    history = {code: points[-1] for code, points in pretrained.saved.get("history", {}).items() if points}
    if not history:
        return []
    rows = [f"| {code} | {perplexity:.2f} | {step} |" for code, (step, perplexity) in history.items()]
    return ["| language | validation perplexity | at step |", "|---|---|---|", *rows, ""]


def _use(stock: bool, languages: list[str]) -> str:
    return STOCK_USE if stock else ROUTED_USE.replace("CODE", json.dumps(languages[-1]))


def _licence(pretrained: Pretrained) -> str:
    """The licences of the texts: the note in the corpus manifest, if the corpus still exists unchanged."""
    note = ""
    manifest = Path(pretrained.saved["config"].get("corpus", "")) / "manifest.json"
    if manifest.is_file() and sha256(manifest) == pretrained.saved.get("manifest"):
        note = json.loads(manifest.read_bytes()).get("licence", "")
    corpus = pretrained.saved["config"].get("corpus", "synthetic")
    if corpus == "synthetic":
        return "Trained on synthetic text only."
    return f"The licences of the texts (corpus `{Path(corpus).name}`) apply: {note or 'see the notes of the corpus.'}"

"""The model card of an exported checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from mlinterf_ds.files import sha256
from mlinterf_ds.pretrained import Pretrained

ROUTED = {
    "adpt": "residual adapters after attention and feed-forward are each language's own",
    "ffn": "feed-forward layers are each language's own",
    "attn": "attention layers are each language's own",
    "share_adpt": "residual adapters, one set for all languages",
    "mono": "one language",
    "joint": "all parameters are shared",
}
DEPARTURES = """\
Departures from the paper: pre-norm (XLM is post-norm); adapters with GELU unless said otherwise, before the residual sum
and after the sublayer's dropout; `ffn` and `attn` routing leaves the norms shared; one vocabulary for a study; perplexities
compare under one vocabulary only."""


def card(pretrained: Pretrained, stock: bool) -> str:
    """README.md: what the model is, how to load it, what it scores."""
    saved, variant, shape = pretrained.saved, pretrained.saved["config"]["variant"], pretrained.shape()
    languages = pretrained.languages
    head = ["---", "language:", *(f"- {json.dumps(code)}" for code in languages)]
    head += ["library_name: transformers", "pipeline_tag: fill-mask", "tags:", "- multilingual", "- mlinterf", "---"]
    how = "by the meta step (Algorithm 1 of the paper)" if variant.startswith("meta_") else "with all the rest"
    trained = f", trained {how}" if pretrained.variant in ("adpt", "ffn", "attn") else ""
    adapters = f", adapters of width {shape.adapter_width} ({shape.adapter_activation})" if "adpt" in variant else ""
    lines = [
        *head,
        f"# {saved['config'].get('name', 'model')}: {variant} on {', '.join(languages)}",
        "",
        "A masked language model of mlinterf_ds, a study of negative interference between languages "
        "([arXiv:2010.03017](https://arxiv.org/abs/2010.03017)).",
        "",
        f"- Variant `{variant}`: {ROUTED[pretrained.variant]}{trained}.",
        f"- {shape.layers} layers, width {shape.width}, {shape.heads} heads of width {shape.kv_channels}, feed-forward "
        f"{shape.ffn}{adapters}, {saved['vocabulary']} pieces, rows of up to {pretrained.positions}.",
        f"- {saved['updates']} steps, checkpoint `{pretrained.path.name}`.",
        "",
        *_scores(pretrained),
        "## Use",
        "",
        _use(stock, languages),
        "",
        "`<mask>` and the other special pieces are read as such where a text has them; otherwise ids equal those of "
        "`sentencepiece.model` on NFC text with single spaces, which the tokenizer makes of any text.",
        "",
        "## Limits and licence",
        "",
        DEPARTURES,
        "",
        _licence(pretrained),
    ]
    return "\n".join(lines) + "\n"


def _scores(pretrained: Pretrained) -> list[str]:
    """Validation perplexity by language, as last measured before the checkpoint."""
    history = {code: points[-1] for code, points in pretrained.saved.get("history", {}).items() if points}
    if not history:
        return []
    rows = [f"| {code} | {perplexity:.2f} | {step} |" for code, (step, perplexity) in history.items()]
    return ["| language | validation perplexity | at step |", "|---|---|---|", *rows, ""]


def _use(stock: bool, languages: list[str]) -> str:
    first = (
        ""
        if stock
        else "import mlinterf_ds.export.modeling_mlinterf  # or trust_remote_code=True in both calls below\n"
    )
    language = "" if stock else f', language="{languages[-1]}"'
    return f"""```python
from transformers import AutoModelForMaskedLM, AutoTokenizer
{first}
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForMaskedLM.from_pretrained(FOLDER).eval()
logits = model(**tokenizer("... <mask> ...", return_tensors="pt"){language}).logits
```"""


def _licence(pretrained: Pretrained) -> str:
    """What is known of the texts' licences: the corpus manifest's note, if the corpus is still at its place."""
    note = ""
    manifest = Path(pretrained.saved["config"].get("corpus", "")) / "manifest.json"
    if manifest.is_file() and sha256(manifest) == pretrained.saved.get("manifest"):
        note = json.loads(manifest.read_text()).get("licence", "")
    corpus = pretrained.saved["config"].get("corpus", "synthetic")
    if corpus == "synthetic":
        return "Trained on synthetic text only."
    return f"The licences of the texts (corpus `{Path(corpus).name}`) apply: {note or 'see the notes kept with the corpus.'}"

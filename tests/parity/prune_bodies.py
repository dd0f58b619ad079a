"""What every rank of a pruning test runs: masks of a small model on a made corpus, at any layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mlinterf_ds.analysis.config import PruneSection
from mlinterf_ds.analysis.masks.gates import Gates
from mlinterf_ds.analysis.masks.learning import Subject, in_language
from mlinterf_ds.data.stream import TrainStream
from mlinterf_ds.engine.optimizer import LossScale
from mlinterf_ds.sections import ModelConfig, RowFormat
from tests.commands import refusal
from tests.parity.bodies import Made
from tests.ranks import laid_out

CODES = ("te", "as")
LENGTH, HEADS, NEURONS = 16, 4, 64
SHAPE = ModelConfig(layers=2, heads=HEADS, width=32, ffn=NEURONS, dropout=0, attention_dropout=0)
PLANTED = {"heads": [1, 2], "neurons": list(range(0, NEURONS, 4))}  # of each layer, without effect
BOTH, ALL = ("heads", "neurons"), ("heads", "neurons", "rows")


def subject(kinds: Sequence[str], tensor: int = 1, variant: str = "joint", spread: float = 1.0) -> Subject:
    """An untrained frozen model on this layout; `spread` multiplies its matrices."""
    from mlinterf_ds.model.encoder import Encoder

    layout = laid_out(tensor)
    corpus = Made(CODES)
    model = Encoder(
        SHAPE, variant=variant, languages=CODES, vocabulary=corpus.vocabulary_size, positions=LENGTH, seed=3
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(spread)
    model.eval().requires_grad_(False)
    gates = Gates(model, kinds, layout.tensor_rank, tensor)
    return Subject(model, gates, corpus, layout, torch.device("cpu"), LossScale(False, {}), RowFormat(LENGTH))


def settings(**changed: Any) -> PruneSection:
    return PruneSection(**({"rows": 8, "steps": 12, "sequences": 8} | changed))


def masks(kinds: Sequence[str], tensor: int, variant: str, micro_batch: int | None = None, seed: int = 0) -> Tensor:
    """pi of one language after a few steps."""
    gated = subject(kinds, tensor, variant, spread=3.0)
    reports: list[float] = []
    pi = gated.learn("as", seed, settings(micro_batch=micro_batch), lambda facts, _: reports.extend(facts.values()))
    return torch.cat([pi, torch.tensor(reports)])


def plant(model: Any) -> None:
    """The planted heads and neurons lose their output weights: nothing of them reaches the rest of the model."""
    width = SHAPE.width // HEADS
    with torch.no_grad():
        for layer in model.block.layers:
            for head in PLANTED["heads"]:
                layer.self_attention.linear_proj.weight[:, head * width : (head + 1) * width] = 0
            layer.mlp.linear_fc2.weight[:, PLANTED["neurons"]] = 0


def trained(steps: int = 200) -> Subject:
    """A model that has learnt the two languages with its planted groups useless throughout."""
    gated = subject(BOTH)
    stream = TrainStream(gated.corpus, CODES, rows=32, row_format=RowFormat(LENGTH), seed=0, mixed=True)
    gated.model.requires_grad_(True)
    optimizer = torch.optim.Adam(gated.model.parameters(), lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        gated.model(stream.batch(step))[0].backward()
        optimizer.step()
        plant(gated.model)
    gated.model.requires_grad_(False)
    return gated


def planted() -> dict[str, Any]:
    """Prune the trained model for both languages, one of them twice; what came of it."""
    gated = trained()
    before = {name: value.clone() for name, value in gated.model.state_dict().items()}
    chosen, short = settings(steps=100, rows=16, sequences=100), settings(steps=5)
    pi = {language: gated.learn(language, 0, chosen, lambda *_: None) for language in CODES}
    again = [gated.learn("te", seed, short, lambda *_: None) for seed in (0, 0, 1)]
    after = gated.model.state_dict()
    batch = in_language(TrainStream(gated.corpus, ["te"], rows=4, row_format=RowFormat(LENGTH), seed=0).batch(0), 0)
    hooks = [m for m in gated.model.modules() if m._forward_hooks or m._forward_pre_hooks]
    return {
        "pi": pi,
        "again": again,
        "unchanged": all(torch.equal(value, after[name]) for name, value in before.items()),
        "hooks": len(hooks),
        "scores": {language: gated.scores(language, pi[language], 0, 100) for language in CODES},
        "kinds": gated.gates.per_group("kind"),
        "names": gated.gates.names,
        "loss": float(gated.model(batch)[0]),
    }


def gated_equals_cut(kind: str) -> float:
    """Largest difference of nll between a model under row-wise gates and one whose weights are multiplied by them."""
    gated = subject((kind,), spread=3.0)
    batch = in_language(TrainStream(gated.corpus, ["te"], rows=3, row_format=RowFormat(LENGTH), seed=0).batch(0), 0)
    with torch.no_grad():  # biases count too
        for name, parameter in gated.model.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-1, 1, generator=torch.Generator().manual_seed(len(name)))
        gates = torch.rand(3, gated.gates.count, generator=torch.Generator().manual_seed(1))
        gates[:, ::3] = 0
        with gated.gates.applied(gates):
            _, nll = gated.model(batch)
        original = {name: value.clone() for name, value in gated.model.state_dict().items()}
        worst = 0.0
        for row in range(3):
            gated.model.load_state_dict(original)
            multiply(gated, gates[row])
            worst = max(worst, float((gated.model(batch)[1][row] - nll[row]).abs().max()))
        gated.model.load_state_dict(original)
        assert not torch.allclose(gated.model(batch)[1], nll, atol=1e-2)
    return worst


def multiply(gated: Subject, gates: Tensor) -> None:
    """theta * z, by hand: columns for heads and neurons, rows for rows."""
    at = 0
    width = SHAPE.width // HEADS
    for layer in gated.model.block.layers:
        for weight, kinds in (
            (layer.self_attention.linear_qkv.weight, "rows"),
            (layer.self_attention.linear_proj.weight, "heads rows"),
            (layer.mlp.linear_fc1.weight, "rows"),
            (layer.mlp.linear_fc2.weight, "neurons rows"),
        ):
            kind = gated.gates.sites[0].kind
            if kind not in kinds:
                continue
            size = weight.shape[0] if kind == "rows" else HEADS if kind == "heads" else NEURONS
            site_gates = gates[at : at + size]
            at += size
            weight.mul_(
                site_gates[:, None] if kind == "rows" else site_gates.repeat_interleave(width if kind == "heads" else 1)
            )
    assert at == gated.gates.count


def refused(kinds: Sequence[str], variant: str) -> str:
    """The message with which gating a model is refused, or the kinds that are gated."""
    from mlinterf_ds.errors import UserError

    try:
        return " ".join(sorted({site.kind for site in subject(kinds, variant=variant).gates.sites}))
    except UserError as error:
        return str(error)


def diverged() -> str:
    gated = subject(BOTH)
    with torch.no_grad():
        gated.model.head.dense.weight.fill_(torch.nan)
    return refusal(gated.learn, "te", 0, settings(), lambda *_: None)

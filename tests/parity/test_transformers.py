"""Our encoder against transformers' XLM-RoBERTa-XL (pre-norm) on copied weights: an independent implementation."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mlinterf_ds.export.classes import Names, joined
from mlinterf_ds.model.encoder import Encoder
from mlinterf_ds.model.layers import at_positions
from mlinterf_ds.sections import ModelConfig

transformers = pytest.importorskip("transformers")

LAYERS, HEADS, WIDTH, FFN, VOCABULARY, LENGTH, ROWS = 3, 4, 32, 96, 150, 20, 4


pytestmark = pytest.mark.usefixtures("one_rank")


def theirs() -> Any:
    config = transformers.XLMRobertaXLConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=FFN,
        max_position_embeddings=LENGTH + 2,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.XLMRobertaXLForMaskedLM(config).eval()
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():  # biases and norms too: all far from their defaults
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            parameter.copy_(centre + torch.randn(parameter.shape, generator=source) * 0.2)
    return model


def copied(model: Any) -> Encoder:
    config = ModelConfig(
        layers=LAYERS, heads=HEADS, width=WIDTH, ffn=FFN, dropout=0, attention_dropout=0, positions=LENGTH + 2,
        position_offset=2, token_types=1,
    )  # fmt: skip
    ours = Encoder(config, variant="mono", languages=["en"], vocabulary=VOCABULARY, positions=LENGTH).eval()
    source = model.state_dict()
    names = Names("xlm-roberta-xl")
    theirs = {name: [source[part] for part in names.theirs(name)] for name in ours.state_dict()}
    target = {name: joined(parts, HEADS) if len(parts) > 1 else parts[0] for name, parts in theirs.items()}
    padding = ours.embeddings.word.num_embeddings - VOCABULARY
    for name in ("embeddings.word.weight", "head.bias"):
        whole = target[name]
        target[name] = torch.cat([whole, torch.full((padding, *whole.shape[1:]), 7.0)])  # must not be seen
    ours.load_state_dict(target)
    return ours


@pytest.mark.parametrize("padded", [False, True])
def test_hidden_states_and_logits(padded: bool) -> None:
    reference = theirs()
    ours = copied(reference)
    source = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, VOCABULARY, (ROWS, LENGTH), generator=source)
    padding = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    if padded:
        padding[1, 13:] = padding[3, 4:] = True
        tokens[padding] = 1
    with torch.no_grad():
        expected = reference(tokens, attention_mask=(~padding).long(), output_hidden_states=True)
        hidden = ours.hidden(tokens, torch.zeros(ROWS, dtype=torch.long), (0,), padding if padded else None)
        logits = ours.logits(hidden)
    torch.testing.assert_close(hidden[~padding], expected.hidden_states[-1][~padding], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[~padding], expected.logits[~padding], rtol=1e-5, atol=1e-5)


def test_loss_and_gradients() -> None:
    reference = theirs()
    ours = copied(reference)
    source = torch.Generator().manual_seed(2)
    tokens = torch.randint(4, VOCABULARY, (ROWS, LENGTH), generator=source)
    positions = torch.rand(ROWS, LENGTH, generator=source).argsort(dim=1)[:, :3]
    labels = torch.randint(4, VOCABULARY, (ROWS, 3), generator=source)
    everywhere = torch.full_like(tokens, -100).scatter(1, positions, labels)
    batch = SimpleNamespace(
        tokens=tokens,
        positions=positions,
        labels=labels,
        weights=torch.full((ROWS, 3), 1 / (3 * ROWS)),
        languages=torch.zeros(ROWS, dtype=torch.long),
        step_languages=(0,),
        segment_ids=None,
        position_ids=None,
        dropout_seed=0,
    )
    loss, _ = ours(batch)
    expected = reference(tokens, labels=everywhere).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    words = reference.roberta.embeddings.word_embeddings.weight.grad
    words_here = ours.embeddings.word.weight.grad[:VOCABULARY].clone()
    words_here[1] = words[1]  # they drop the gradient of their padding token
    torch.testing.assert_close(words_here, words, rtol=1e-5, atol=1e-5)
    attention = reference.roberta.encoder.layer[0].attention.self
    qkv = ours.block.layers[0].self_attention.linear_qkv.weight.grad.unflatten(0, (HEADS, 3, -1))
    for part, projection in enumerate((attention.query, attention.key, attention.value)):
        torch.testing.assert_close(qkv[:, part].flatten(0, 1), projection.weight.grad, rtol=1e-4, atol=1e-5)


def test_positions_are_picked_by_row() -> None:
    hidden = torch.arange(24.0).view(2, 4, 3)
    picked = at_positions(hidden, torch.tensor([[3, 0], [1, 1]]))
    assert torch.equal(picked, torch.stack([hidden[0, [3, 0]], hidden[1, [1, 1]]]))

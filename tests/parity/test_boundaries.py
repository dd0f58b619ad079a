"""Boundaries inside packed rows: tokens see their own segment alone, as if it were fed in a row of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mlinterf_ds.data.batch import Batch as DataBatch
from mlinterf_ds.data.batch import Masker
from mlinterf_ds.data.corpus import Corpus
from mlinterf_ds.data.evaluation import EvaluationSet
from mlinterf_ds.data.prepare.main import prepare
from mlinterf_ds.data.tokenizer import EOS, Vocabulary
from mlinterf_ds.data.windows import Windows
from mlinterf_ds.sections import RowFormat
from tests.model_batches import LENGTH, VARIANTS, Batch, batch, encoder, gradients, hidden


def segment_by_segment(rows: Batch) -> list[Batch]:
    """Each segment of each row as a batch of its own, with the predictions that lie in it."""
    parts = []
    for row in range(len(rows.tokens)):
        for segment in rows.segment_ids[row].unique():  # type: ignore[index]
            columns = (rows.segment_ids[row] == segment).nonzero().flatten()  # type: ignore[index]
            inside = torch.isin(rows.positions[row], columns)
            parts.append(
                replace(
                    rows,
                    tokens=rows.tokens[row, columns][None],
                    positions=(rows.positions[row, inside] - columns[0])[None],
                    labels=rows.labels[row, inside][None],
                    weights=rows.weights[row, inside][None],
                    languages=rows.languages[row, None],
                    step_languages=(int(rows.languages[row]),),
                    segment_ids=None,
                    position_ids=rows.position_ids[row, columns][None],  # type: ignore[index]
                )
            )
    return parts


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("kind", ["learned", "rotary"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_packed_row_equals_its_segments_fed_one_by_one(variant: str, recompute: bool, kind: str) -> None:
    """The sums are of the same terms in another order: in float64 they differ by round-off, far below 1e-12."""
    model, rows = encoder(variant, recompute=recompute, position_kind=kind).double(), batch([2, 0, 1, 0, 2])
    loss, nll = model(rows)
    loss.backward()
    packed, apart, total = gradients(model), [], 0.0
    for part in segment_by_segment(rows):
        own_loss, own = model(part)
        own_loss.backward()
        total += own_loss.item()
        apart.append(own.flatten())
    torch.testing.assert_close(torch.cat(apart), by_column(rows, nll), rtol=1e-12, atol=1e-12)
    assert total == pytest.approx(loss.item(), rel=1e-6)  # the weights are float32
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, packed[name], rtol=1e-9, atol=1e-12, msg=name)


def by_column(rows: Batch, nll: torch.Tensor) -> torch.Tensor:
    """The values of the predictions in the order in which `segment_by_segment` visits them."""
    segments = rows.segment_ids.gather(1, rows.positions)  # type: ignore[union-attr]
    order = [(row, int(segments[row, k]), k) for row in range(len(nll)) for k in range(nll.shape[1])]
    return torch.stack([nll[row, k] for row, _, k in sorted(order)])


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["learned", "rotary"])
@pytest.mark.parametrize("variant", ["joint", "adpt", "ffn", "attn"])
def test_nothing_crosses_a_boundary(variant: str, kind: str, dtype: torch.dtype, dropout: float) -> None:
    """Other tokens in a neighbouring segment leave every bit of this one as it was, in each of the attention kernels."""
    model, rows = encoder(variant, dropout, position_kind=kind).to(dtype), batch([0, 0, 0])
    last = rows.segment_ids == rows.segment_ids.max(dim=1, keepdim=True).values  # type: ignore[union-attr]
    assert (~last).any() and last.any()
    torch.manual_seed(0)
    before = hidden(model, rows)
    torch.manual_seed(0)
    after = hidden(model, replace(rows, tokens=torch.where(last, (rows.tokens + 7) % 90, rows.tokens)))
    assert torch.equal(before[~last], after[~last])
    assert not torch.equal(before[last], after[last])


def made(boundaries: str, positions: str) -> DataBatch:
    """A batch of one row over the text a b </s> c </s> d e f, of which c and d begin sentences, and d a document."""
    text = np.array([10, 11, EOS, 12, EOS, 13, 14, 15])
    windows = Windows(text, 8, 0, (lambda offsets: offsets == 5) if boundaries == "document" else None)
    row_format = RowFormat(9, boundaries=boundaries, positions=positions)  # type: ignore[arg-type]
    masker = Masker(0, "test", row_format, Vocabulary(20))
    return masker.batch(*windows.at(np.array([0])), np.ones(1), np.zeros(1), (0,), step=0, start=0)


def test_segments_and_positions_by_hand() -> None:
    sentence = made("sentence", "boundary")
    assert sentence.segment_ids is not None and sentence.position_ids is not None
    assert sentence.segment_ids.tolist() == [[0, 0, 0, 0, 1, 1, 2, 2, 2]]
    assert sentence.position_ids.tolist() == [[0, 1, 2, 3, 1, 2, 1, 2, 3]]
    document = made("document", "boundary")
    assert document.segment_ids is not None and document.position_ids is not None
    assert document.segment_ids.tolist() == [[0, 0, 0, 0, 0, 0, 1, 1, 1]]
    assert document.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 1, 2, 3]]
    assert made("sentence", "row").position_ids is None and made("none", "boundary").segment_ids is None
    assert torch.equal(made("none", "row").tokens, sentence.tokens), "boundaries change no token"


def test_a_texts_end_is_a_boundary() -> None:
    windows = Windows(np.array([10, EOS, 11, 12, EOS]), 4, 0, lambda offsets: offsets < 0)
    text, begins = windows.at(np.array([3]))
    assert text.tolist() == [[12, EOS, 10, EOS]] and begins.tolist() == [[False, False, True, False]]


def test_documents_of_a_prepared_corpus(tmp_path: Path) -> None:
    """The boundaries in rows are those of the documents that were written, wherever they came to lie after shuffling."""
    lines, number = [], 0
    for document in range(300):
        sentences = []
        for _ in range(1 + document % 3):
            sentences.append(f"w{document:03d} begins line {number} here.")
            number += 1
        lines.append(f'<doc id="{document}">\n' + "\n".join(sentences) + "\n</doc>\n")
    (tmp_path / "en.txt").write_text("".join(lines))
    (tmp_path / "sw.txt").write_text("".join(f"line {number} stands alone\n" for number in range(300)))
    prepare(
        {"en": [str(tmp_path / "en.txt")], "sw": [str(tmp_path / "sw.txt")]}, tmp_path / "corpus", vocabulary_size=120
    )
    corpus = Corpus.open(tmp_path / "corpus")
    tokens = np.array(corpus.tokens("en", "train"))
    firsts = np.concatenate([[0], np.flatnonzero(tokens == EOS)[:-1] + 1])
    sentences = [corpus.tokenizer.decode(part.tolist()) for part in np.split(tokens, firsts[1:])]
    documents = [sentence.split()[0] for sentence in sentences]
    wanted = [k == 0 or documents[k] != documents[k - 1] for k in range(len(documents))]
    assert corpus.starts_document("en", "train", firsts).tolist() == wanted
    assert 100 < sum(wanted) < len(wanted)
    other = np.flatnonzero(np.array(corpus.tokens("sw", "train")) == EOS)[:-1] + 1
    assert corpus.starts_document("sw", "train", other).all(), "a line that stands alone is a document"
    rows = EvaluationSet(corpus, "en", "train", languages=["en"], row_format=RowFormat(32)).batch(0, 4)
    assert rows.segment_ids is not None
    starts = set(firsts[wanted].tolist())
    for row in range(4):
        begins = (rows.segment_ids[row].diff() > 0).nonzero().flatten().tolist()
        assert begins == [k for k in range(1, 31) if 31 * row + k in starts]
    assert rows.segment_ids.shape == (4, 32) and LENGTH < 32

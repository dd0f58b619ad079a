"""Gradient conflict's arithmetic on one process: places in a parameter, projections, cosines, batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mlinterf_ds.engine.engine import SHARED
from mlinterf_ds.engine.space import Segment
from mlinterf_ds.errors import UserError
from mlinterf_ds.gradients import similarity
from mlinterf_ds.gradients.measure import Draws
from mlinterf_ds.gradients.similarity import Exact, Similarity, Sketch, group_of, groups_of, runs, spread
from mlinterf_ds.pretrain.config import ConflictConfig
from mlinterf_ds.runtime.parallel import Layout
from mlinterf_ds.sections import RowFormat
from tests.parity.bodies import Made

WORD, OUT = "embeddings.word.weight", "block.layers.0.mlp.linear_fc2.weight"
SHAPES = {WORD: (24, 10), OUT: (6, 40), "head.norm.weight": (7,)}
DIMS = {WORD: 0, OUT: 1, "head.norm.weight": None}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over ranks are this process's own."""
    monkeypatch.setattr(similarity.dist, "all_reduce", lambda tensor: None)


def engine(segments: list[Segment], elements: int, layout: Layout) -> Any:
    space = SimpleNamespace(
        parameters=dict.fromkeys(SHAPES), counted=segments, masters=[torch.zeros(elements)], segments=segments
    )
    return SimpleNamespace(spaces={SHARED: space}, device=torch.device("cpu"), layout=layout)


def shard(whole: dict[str, torch.Tensor], layout: Layout, part: int, parts: int) -> tuple[list[Segment], torch.Tensor]:
    """A ZeRO rank's segments and shard (part of parts) on a tensor-parallel rank."""
    segments, pieces, offset = [], [], 0
    for name, tensor in whole.items():
        dim = DIMS[name]
        if dim is None and layout.tensor_rank:
            continue
        local = tensor if dim is None else tensor.chunk(layout.tensor, dim)[layout.tensor_rank]
        width = -(-local.numel() // parts)
        start = min(part * width, local.numel())
        length = min(width, local.numel() - start)
        segments.append(Segment(name, tuple(local.shape), start, length, 0, offset, dim))
        pieces.append(local.flatten()[start : start + length])
        offset += length
    return segments, torch.cat(pieces)


def test_groups_by_hand() -> None:
    assert group_of("block.layers.11.self_attention.linear_qkv.weight") == (11, "attention")
    assert group_of("block.layers.0.mlp.linear_fc1.bias") == (0, "ffn")
    for name in ("input_layernorm.weight", "pre_mlp_layernorm.bias", "mlp_bda.adapter.up.weight"):
        assert group_of(f"block.layers.2.{name}") == (2, "other")
    assert group_of("embeddings.position.weight") == (None, "embedding")
    assert group_of("head.bias") == group_of("block.final_layernorm.weight") == (None, "other")


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("parts", [1, 3])
def test_runs_lie_where_the_whole_parameter_says(tensor: int, parts: int) -> None:
    """The whole parameter counts 0, 1, 2...: every element's value is its position."""
    whole = {name: torch.arange(int(np.prod(shape))).view(shape) for name, shape in SHAPES.items()}
    seen = dict.fromkeys(SHAPES, 0)
    for rank in range(tensor):
        for part in range(parts):
            segments, flat = shard(whole, Layout(rank, tensor, tensor), part, parts)
            for segment in segments:
                copies = tensor if segment.partition_dim is not None else 1
                covered = []
                for begin, length, position in runs(segment, copies, rank):
                    assert flat[begin : begin + length].tolist() == list(range(position, position + length))
                    covered += range(begin, begin + length)
                assert covered == list(range(segment.offset, segment.offset + segment.length))
                seen[segment.name] += len(covered)
    assert seen == {name: int(np.prod(shape)) for name, shape in SHAPES.items()}


def test_ranks_projections_add_up_to_the_wholes() -> None:
    source = torch.Generator().manual_seed(0)
    whole = {name: torch.randn(shape, generator=source) for name, shape in SHAPES.items()}

    def project(layout: Layout, part: int, parts: int) -> torch.Tensor:
        segments, flat = shard(whole, layout, part, parts)
        sketch = Sketch(engine(segments, len(flat), layout), 16, seed=3)
        sketch.add([flat])
        return sketch._sketches[0]

    wanted = project(Layout(0, 1, 1), 0, 1)
    summed = sum(project(Layout(rank, 2, 2), part, 3) for rank in range(2) for part in range(3))
    assert wanted.abs().sum() > 1 and wanted.shape == (3, 16)
    torch.testing.assert_close(summed, wanted)


def pair(kind: str, cosine: float) -> torch.Tensor:
    """(2, 64 * 64) with this cosine; 'columns': almost everything lies in two of 64 columns, as outlier features do."""
    source = torch.Generator().manual_seed(1)
    basis = torch.randn(2, 64, 64, generator=source)
    if kind == "columns":
        basis[:, :, 2:] *= 0.01
    if kind == "positive":
        basis.abs_()
    first, second = basis.flatten(1).double()
    first = first / first.norm()
    second = second - (second @ first) * first
    second = cosine * first + (1 - cosine**2) ** 0.5 * second / second.norm()
    return torch.stack([first, second]).float()


@pytest.mark.parametrize("kind", ["normal", "columns", "positive"])
@pytest.mark.parametrize("cosine", [-0.3, 0.0, 0.9])
def test_error_of_the_projection_over_seeds(kind: str, cosine: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root mean square error at most the stated standard error (50 seeds, so 10%, and second-order terms: 30% above it at most), no bias."""
    monkeypatch.setattr(similarity, "SIGNS", 1 << 14)  # quicker to draw
    k = 64
    rows = pair(kind, cosine)
    segment = Segment(WORD, (64, 64), 0, rows.shape[1], 0, 0, None)
    errors = []
    for seed in range(50):
        sketch = Sketch(engine([segment], rows.shape[1], Layout(0, 1, 1)), k, seed)
        for row in rows:
            sketch.add([row])
        table = sketch.products().sum(axis=0)
        errors.append(table[0, 1] / np.sqrt(table[0, 0] * table[1, 1]) - cosine)
    bound = (1 - cosine**2) / np.sqrt(k)
    assert 0.5 * bound < np.sqrt(np.mean(np.square(errors))) < 1.3 * bound
    assert abs(np.mean(errors)) < 0.25 * bound


def test_exact_products_by_group() -> None:
    segments, flat = shard({n: torch.ones(s) for n, s in SHAPES.items()}, Layout(0, 1, 1), 0, 1)
    stub = engine(segments, len(flat), Layout(0, 1, 1))
    table = Exact(stub)
    for factor in (1.0, -2.0):
        table.add([flat * factor])
    sizes = {(None, "embedding"): 240, (0, "ffn"): 240, (None, "other"): 7}
    assert set(groups_of(stub.spaces[SHARED])) == set(sizes)
    for group, products_ in zip(table.groups, table.products(), strict=True):
        assert products_.tolist() == [[sizes[group], -2 * sizes[group]], [-2 * sizes[group], 4 * sizes[group]]]


def test_similarity_by_hand() -> None:
    """Two languages, gradients (1,0) (1,0) and (0,1) (1,1) in one group, nothing but zeros in the other."""
    rows = np.array([[1.0, 0], [1, 0], [0, 1], [1, 1]])
    measured = Similarity(("a", "b"), [(0, "ffn"), (None, "other")], np.stack([rows @ rows.T, np.zeros((4, 4))]))
    half = 0.5**0.5
    np.testing.assert_allclose(measured.matrix(), [[1, half / 2], [half / 2, half]])
    np.testing.assert_allclose(measured.corrected(), [[1, half / 2 / half**0.5], [half / 2 / half**0.5, 1]])
    np.testing.assert_array_equal(measured.matrix(0), measured.matrix("all", "ffn"))
    assert np.isnan(measured.matrix(None, "other")).all()
    assert spread(measured.matrix()) == pytest.approx(
        {"within": (1 + half) / 2, "between": half / 2, "least": half / 2}
    )
    assert list(measured.scopes()) == [("all", "all"), ("all", "ffn"), ("all", "other"), (0, "all"), (0, "ffn")]
    assert "between" not in spread(np.ones((1, 1)))


def draws(sequences: int | None, ranks: int = 1, rank: int = 0, languages: tuple[str, ...] = ("te", "as")) -> Draws:
    def slices(rows: int, micro: int) -> list[tuple[int, int]]:
        rank_rows = rows // ranks
        return [
            (s, min(s + micro, (rank + 1) * rank_rows)) for s in range(rank * rank_rows, (rank + 1) * rank_rows, micro)
        ]

    fake: Any = SimpleNamespace(device=torch.device("cpu"), layout=Layout(rank, ranks, 1), slices=slices)
    config = ConflictConfig(sequences=sequences, micro_batch=3)  # type: ignore[call-arg]
    return Draws(Made(), languages, Made().languages, config=config, row_format=RowFormat(16), seed=0, engine=fake)


@pytest.mark.parametrize("count", [2, 6])
def test_chance_alone_rarely_leaves_the_noise(count: int) -> None:
    """Languages whose true gradients are at right angles, and batches that differ from them: of similarities that the figure does not
    put into brackets at most 5% are of chance (here with three standard errors)."""
    draw, outside, cells = np.random.default_rng(0), 0, 0
    for _ in range(300):
        true = np.linalg.qr(draw.normal(size=(100, count)))[0].T
        gradients = np.repeat(true, 2, axis=0) + 0.05 * draw.normal(size=(2 * count, 100))
        measured = Similarity(tuple("abcdefgh"[:count]), [(0, "ffn")], (gradients @ gradients.T)[None])
        off = ~np.eye(count, dtype=bool)
        outside += int((abs(measured.matrix()) > measured.noise())[off].sum()) // 2
        cells += count * (count - 1) // 2
    assert 0 < outside / cells < 0.05 + 3 * (0.05 * 0.95 / 300) ** 0.5


def test_batches_are_disjoint_fresh_and_the_same_on_any_ranks() -> None:
    whole = draws(None)
    assert whole.rows == 64, "the default on a CPU"
    both = [torch.cat([b.labels for b in whole.batches("as", draw, 0)]) for draw in (0, 1)]
    assert both[0].shape == (64, 2)
    windows = whole._windows["as"]
    texts = [windows.visit(np.arange(draw * 64, draw * 64 + 64))[0] for draw in (0, 1)]
    rows = [tuple(row) for text in texts for row in text.tolist()]
    assert len(set(rows)) == 128, "no row twice"
    weights = sum(float(batch.weights.sum()) for batch in whole.batches("as", 0, 0))
    assert weights == pytest.approx(1)
    assert all(
        set(batch.languages.tolist()) == {1} and batch.step_languages == (1,) for batch in whole.batches("as", 0, 0)
    )
    assert not torch.equal(torch.cat([b.labels for b in whole.batches("as", 0, 1)]), both[0])
    parts = [torch.cat([b.tokens for b in draws(None, 2, rank).batches("as", 1, 5)]) for rank in (0, 1)]
    assert torch.equal(torch.cat(parts), torch.cat([b.tokens for b in whole.batches("as", 1, 5)]))
    alone = draws(None, languages=("as",))
    assert torch.equal(alone.batches("as", 0, 0)[0].tokens, whole.batches("as", 0, 0)[0].tokens)


@pytest.mark.parametrize(
    "sequences, ranks, words", [(67, 1, ["conflict.sequences=67", "133 rows", "66"]), (9, 2, ["9", "2 data-parallel"])]
)
def test_impossible_numbers_of_sequences(sequences: int, ranks: int, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        draws(sequences, ranks)
    assert all(word in str(error.value) for word in words)


def test_short_texts_shorten_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = Made.tokens
    monkeypatch.setattr(Made, "tokens", lambda self, lang, split: tokens(self, lang, split)[: 15 * 11])
    assert draws(None).rows == 5 and draws(None, ranks=2).rows == 4
    monkeypatch.setattr(Made, "tokens", lambda self, lang, split: tokens(self, lang, split)[:20])
    with pytest.raises(UserError, match="'te'.*20 tokens"):
        draws(None)

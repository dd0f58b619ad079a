"""Heat maps and conflict figures: what they draw, the table beside them, names in any script."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from mlinterf_ds.errors import UserError
from mlinterf_ds.gradients.measure import read_curves
from mlinterf_ds.plots.bars import Value, bars, intervals
from mlinterf_ds.plots.curves import Curves, seed_curves, training_curves
from mlinterf_ds.plots.heatmaps import heatmaps
from mlinterf_ds.plots.similarity import by_component, layers_figure


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_a_heat_map_is_a_picture_a_drawing_and_a_table(tmp_path: Path) -> None:
    heatmaps({"model": np.eye(2)}, ["a", "b"], ["a", "b"], tmp_path / "m.png", title="t", label="cosine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.csv", "m.png", "m.svg"]
    assert (tmp_path / "m.png").stat().st_size > 1000 and "</svg>" in (tmp_path / "m.svg").read_text("utf-8")


def test_a_heat_map_shows_its_numbers_and_writes_them(tmp_path: Path, drawn: list[Figure]) -> None:
    values = {"model": np.array([[0.8, -0.25], [-0.25, np.nan]]), "ffn": np.full((2, 2), 0.5)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = tmp_path / "m.png"
        heatmaps(values, ["русский", "العربية"], ["a", "b"], path, title="t", label="cosine", signed=True)
    assert texts(drawn[0])[:3] == ["0.80", "-0.25", "-0.25"] and texts(drawn[0]).count("0.50") == 4
    with path.with_suffix(".csv").open(encoding="utf-8") as file:
        rows = {(row["panel"], row["row"], row["column"]): row["value"] for row in csv.DictReader(file)}
    assert rows["model", "русский", "b"] == "-0.25" and rows["model", "العربية", "b"] == "" and len(rows) == 8
    low, high = drawn[0].axes[0].images[0].get_clim()
    assert (low, high) == (-0.8, 0.8), "symmetric: white is zero"
    assert drawn[0].axes[1].images[0].get_clim() == (low, high), "one scale for all panels"


def test_colours_of_scores_and_of_signed_values(tmp_path: Path, drawn: list[Figure]) -> None:
    scores = {"joint": np.array([[30.0, 60.0], [45.0, np.nan]])}
    heatmaps(scores, ["a", "b"], ["a", "b"], tmp_path / "s.png", title="t", label="f1", form=".1f")
    (image,) = drawn[0].axes[0].images
    assert image.get_clim() == (30, 60) and image.get_cmap().name == "YlGnBu", "from pale to dark"
    noise = {"joint": np.array([[0.1, np.nan], [0.3, 0.2]])}
    values = {"joint": np.array([[0.05, 0.5], [-0.2, -0.4]])}
    heatmaps(
        values,
        ["a", "b"],
        ["a", "b"],
        tmp_path / "p.png",
        title="t",
        label="bits",
        form="+.2f",
        signed=True,
        noise=noise,
    )
    assert texts(drawn[1]) == ["(+0.05)", "+0.50", "(-0.20)", "-0.40"], "what is noise is in brackets"
    marks = [float(line.get_ydata()[0]) for line in drawn[1].axes[1].lines]
    assert marks == [-0.2, 0.2], "the scale shows the median noise"


def test_a_model_keeps_its_colour(tmp_path: Path, drawn: list[Figure]) -> None:
    values = [Value("sw", "mono", 1.0), Value("sw", "adpt", 2.0)]
    bars(values, tmp_path / "b.png", title="t", label="x")
    intervals(values[1:], tmp_path / "i.png", title="t", label="x")
    seed_curves({"sw": {"adpt with en": {0: [(1, 1.0), (2, 2.0)]}}}, tmp_path / "c.png", title="t", label="x")
    colours = [to_rgba(drawn[0].axes[0].patches[1].get_facecolor())]
    colours += [to_rgba(figure.axes[0].lines[0].get_color()) for figure in drawn[1:]]
    assert len(set(colours)) == 1
    matrices = {part: {0: np.ones((2, 2)), 1: np.ones((2, 2))} for part in ("attention", "ffn")}
    matrices["ffn"] = {layer: np.where(np.eye(2), np.nan, m) for layer, m in matrices["ffn"].items()}  # no within there
    layers_figure(matrices, ["a", "b"], tmp_path / "l.png", title="t", caption="")
    panels = [{line.get_label(): line.get_color() for line in axes.lines} for axes in drawn[3].axes[:2]]
    assert panels[0]["a–b"] == panels[1]["a–b"] and "a–a" not in panels[1]


def test_many_languages_are_not_written_over_each_other(tmp_path: Path, drawn: list[Figure]) -> None:
    codes = [f"l{number:03d}" for number in range(100)]
    heatmaps({"model": np.zeros((100, 100))}, codes, codes, tmp_path / "m.png", title="t", label="cosine")
    assert texts(drawn[0]) == [] and len(drawn[0].axes[0].get_xticklabels()) <= 60
    boxes = sorted(label.get_window_extent().x0 for label in drawn[0].axes[0].get_xticklabels())
    assert min(np.diff(boxes)) > 5, "pixels"


def curves(pairs: list[tuple[str, str]], points: int = 5) -> Curves:
    return {pair: [(10 * i, 0.1 * place + 0.01 * i) for i in range(points)] for place, pair in enumerate(pairs)}


def test_figure_3_draws_every_pair_of_two_runs(tmp_path: Path, drawn: list[Figure]) -> None:
    runs = {run: curves([("en", "en"), (code, code), ("en", code)]) for run, code in (("en-ar", "ar"), ("en-fr", "fr"))}
    training_curves(runs, tmp_path / "f.png", title="t")
    named = [text.split("  ") for text in texts(drawn[0])]
    assert ["en–ar (en-ar)", "0.24"] in named and ["en–en (en-fr)", "0.04"] in named and len(named) == 6
    lines = [line for line in drawn[0].axes[0].lines if len(np.asarray(line.get_xdata())) == 5]
    assert sum(line.is_dashed() for line in lines) == 4 and len(lines) == 6
    wanted = [[10.0 * i, 0.2 + 0.01 * i] for i in range(5)]
    assert any(np.allclose(np.asarray(line.get_xydata()), wanted) for line in lines)


def test_of_many_pairs_the_mean_and_the_range(tmp_path: Path, drawn: list[Figure]) -> None:
    codes = ["a", "b", "c", "d"]
    pairs = [(left, right) for left in codes for right in codes if left <= right]
    training_curves({"run": curves(pairs)}, tmp_path / "f.png", title="t")
    within = np.mean([0.1 * place for place, pair in enumerate(pairs) if pair[0] == pair[1]]) + 0.04
    assert texts(drawn[0]) == [f"between two  {np.mean([0.1 * p for p, q in enumerate(pairs) if q[0] != q[1]]) + 0.04:.2f}",
                               f"within a language  {within:.2f}"]  # fmt: skip
    assert len(drawn[0].axes[0].collections) == 2, "two bands"


def test_long_lines_are_smoothed_and_kept_pale(tmp_path: Path, drawn: list[Figure]) -> None:
    noisy: Curves = {("a", "b"): [(i, (-1.0) ** i) for i in range(400)]}
    training_curves({"run": noisy}, tmp_path / "f.png", title="t")
    reach = sorted(
        np.ptp(np.asarray(line.get_ydata())) for line in drawn[0].axes[0].lines if len(line.get_xdata()) == 400
    )
    assert len(reach) == 2 and reach[0] < 0.5 and reach[1] == 2


def test_components_by_layer(tmp_path: Path, drawn: list[Figure]) -> None:
    table = {"whole model": {"": (0.7, 0.1)}, "ffn": {"0": (0.5, 0.2), "1": (0.6, float("nan"))}}
    by_component(table, tmp_path / "c.png", title="t")
    layered, flat = drawn[0].axes
    assert layered.get_title() == "ffn" and [t.get_text() for t in flat.get_xticklabels()] == ["whole\nmodel"]
    assert [list(map(float, line.get_ydata())) for line in layered.lines[:1]] == [[0.5, 0.6]]
    assert float(flat.lines[1].get_ydata()[0]) == 0.1


@pytest.mark.parametrize(
    "content, words",
    [
        ("step,scope,left,right,cosine\n", "no measurement"),
        ("a,b\n1,2\n", "not a table of step"),
        ("step,scope,left,right,cosine\nx,model,a,b,0.1\n", "not a table"),
    ],
)
def test_what_is_no_table_of_figure_3(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "conflict.csv").write_text(content)
    with pytest.raises(UserError, match=words):
        read_curves(tmp_path / "conflict.csv")
    with pytest.raises(UserError, match="conflict.every"):
        read_curves(tmp_path / "missing.csv")

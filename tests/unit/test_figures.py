"""The perplexity figure: what it draws, how many names it shows, and that it leaves nothing behind."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from mlinterf_ds.plots import style
from mlinterf_ds.plots.curves import perplexity_curves
from mlinterf_ds.plots.style import Points


def curve(final: float, start: float = 500.0, points: int = 12) -> Points:
    return [(100 * (i + 1), final + (start - final) * 0.6**i) for i in range(points)]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_png_and_svg_without_leftovers(tmp_path: Path) -> None:
    perplexity_curves({"en": curve(40), "sw": curve(60)}, tmp_path / "new" / "curves.png", title="en-sw")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["curves.png", "curves.svg"]
    image = imread(tmp_path / "new" / "curves.png")
    assert image.shape[0] > 400 and image.shape[1] > 900
    assert image[..., :3].std() > 0.02
    assert "</svg>" in (tmp_path / "new" / "curves.svg").read_text("utf-8")


def test_same_history_same_picture(tmp_path: Path) -> None:
    for name in ("a", "b"):
        perplexity_curves({"en": curve(40)}, tmp_path / f"{name}.png", title="t")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("count", [1, 2, 20, 21, 100])
def test_names_stay_readable(count: int, tmp_path: Path, drawn: list[Figure]) -> None:
    history = {f"l{i:03d}": curve(30 + i) for i in range(count)}
    perplexity_curves(history, tmp_path / "f.png", title="many", baselines={"l000": 300.0})
    labels = [text for text in drawn[0].axes[0].texts if text.get_text().startswith("l0")]
    expected = sorted(history) if count <= 20 else sorted(history)[:4] + sorted(history)[-4:]
    assert sorted(label.get_text().split()[0] for label in labels) == expected
    boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.y0)
    assert all(upper.y0 >= lower.y0 + 0.8 * lower.height for lower, upper in itertools.pairwise(boxes))
    assert all(
        box.x0 >= 0 and box.x1 <= drawn[0].bbox.x1 and box.y0 >= 0 and box.y1 <= drawn[0].bbox.y1 for box in boxes
    )


def test_lines_hold_the_data(tmp_path: Path, drawn: list[Figure]) -> None:
    perplexity_curves({"en": [(200, 50.0), (100, 80.0)]}, tmp_path / "f.png", title="t", baselines={"en": 90, "fr": 9})
    lines = [np.asarray(line.get_xydata()).tolist() for line in drawn[0].axes[0].lines]
    assert [[100.0, 80.0], [200.0, 50.0]] in lines, "in the order of the steps"
    flat = [line for line in drawn[0].axes[0].lines if np.asarray(line.get_ydata()).tolist() == [90, 90]]
    assert len(flat) == 1 and flat[0].is_dashed()
    assert not any(9 in np.asarray(line.get_ydata()) for line in drawn[0].axes[0].lines), "fr has no curve"


def test_logarithmic_only_if_wide(tmp_path: Path, drawn: list[Figure]) -> None:
    perplexity_curves({"en": curve(40, start=90)}, tmp_path / "f.png", title="narrow")
    perplexity_curves({"en": curve(40, start=900)}, tmp_path / "f.png", title="wide")
    assert [figure.axes[0].get_yscale() for figure in drawn] == ["linear", "log"]


def test_values_that_cannot_be_drawn(tmp_path: Path, drawn: list[Figure]) -> None:
    history = {"en": [(1, float("inf")), (2, float("nan")), (3, 50.0)], "sw": [(1, float("nan"))], "fr": []}
    perplexity_curves(history, tmp_path / "f.png", title="t", baselines={"en": float("inf")})
    perplexity_curves({}, tmp_path / "g.png", title="t")
    assert texts(drawn[0]) == ["en  50.0"]
    assert texts(drawn[1]) == ["no evaluation yet"]


def test_looks_differ() -> None:
    looks = [str(style.look(index)) for index in range(20)]
    assert len(set(looks)) == 20
    assert len({str(style.look(index)["marker"]) for index in range(7)}) == 7, "told apart in grey too"


def test_fonts_fall_back_to_one_that_has_the_character() -> None:
    default = style._characters(style.font_manager.findfont("DejaVu Sans"))
    names = sorted({font.name for font in style.font_manager.fontManager.ttflist})
    others = ((name, style._characters(style.font_manager.findfont(name))) for name in names)
    name, character = next((n, chr(min(c - default))) for n, c in others if c - default)  # matplotlib ships such fonts
    families = style.families("en " + character)
    assert style.families("en") == families[:1] == ["DejaVu Sans"]
    assert len(families) == 2, f"{name} has U+{ord(character):04X}"
    assert ord(character) in style._characters(style.font_manager.findfont(families[1]))


@pytest.mark.parametrize("wanted", [[], [0.5], [0.5] * 5, [0.0, 0.0, 0.9, 1.0, 1.0], [0.1, 0.11, 0.2, 0.21, 0.22]])
def test_apart(wanted: list[float]) -> None:
    placed = style._apart(wanted, 0.1)
    assert len(placed) == len(wanted)
    assert all(-1e-9 <= value <= 1 + 1e-9 for value in placed)
    assert all(b - a >= 0.1 - 1e-9 for a, b in itertools.pairwise(placed))
    assert style._apart([0.1, 0.9], 0.1) == [0.1, 0.9], "nothing moves without need"


def test_a_failed_drawing_keeps_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f.png"
    perplexity_curves({"en": curve(40)}, path, title="t")
    before = path.read_bytes()

    def half(self: Figure, target: IO[bytes], **options: object) -> None:
        target.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        perplexity_curves({"en": curve(10)}, path, title="t")
    assert path.read_bytes() == before


def test_pyplot_is_not_touched(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from mlinterf_ds.plots.curves import perplexity_curves as draw;"
        f"draw({{'en': [(1, 2.0)]}}, pathlib.Path({str(tmp_path / 'f.png')!r}), title='t');"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=200, check=False).returncode == 0

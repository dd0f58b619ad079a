"""The paper's own numbers (Wang, Lipton and Tsvetkov 2020, tables 1 to 7), shown beside ours.

paper.csv has tables 2, 3, 6 and 7; table 3 is the F1 of table 7. `xlm` is the paper's XLM-100, a joint model of 100 languages and
827M parameters. Two numbers are misprints and left out; `MISPRINTS` says why.
"""

from __future__ import annotations

import csv
from pathlib import Path

ROWS = ["mono", "joint", "ffn", "attn", "adpt", "share_adpt", "meta_adpt", "xlm"]
WITHIN, ZERO_SHOT = "within", "zero-shot"

# Table 1: millions of sentences of Wikipedia
SENTENCES = {"en": 44.6, "ar": 8.7, "fr": 16.2, "ru": 13.1, "hi": 0.5, "sw": 0.2, "te": 0.3}

# Table 4: (task, setting) -> model -> hi, te
TRILINGUAL = {
    ("ner", WITHIN): {"pair": (88.3, 76.2), "triple": (87.8, 76.4)},
    ("pos", WITHIN): {"pair": (95.2, 88.7), "triple": (95.3, 88.7)},
    ("ner", ZERO_SHOT): {"pair": (61.4, 45.2), "triple": (63.5, 47.6)},
    ("pos", ZERO_SHOT): {"pair": (58.9, 72.8), "triple": (59.5, 74.4)},
}
# Table 5: (task, metric) -> row -> fr, its low-resource version, ru, its low-resource version
CORPUS_SIZE: dict[tuple[str, str], dict[str, tuple[float | None, ...]]] = {
    ("ner", "f1"): {"mono": (88.0, 81.7, 87.8, 82.4), "joint": (86.5, 83.2, 84.2, 82.7), "source": (78.6, 78.4, 75.8, 75.9)},
    ("pos", "f1"): {"mono": (76.2, 68.5, 96.7, 88.7), "joint": (75.8, 71.4, 93.2, 89.5), "source": (94.5, 94.5, 92.7, 92.3)},
    ("qa", "f1"): {"mono": (None, None, 63.1, 47.2), "joint": (None, None, 58.2, 49.5), "source": (None, None, 61.7, 62.1)},
    ("qa", "em"): {"mono": (None, None, 49.2, 29.5), "joint": (None, None, 43.1, 30.4), "source": (None, None, 49.8, 50.2)},
}  # fmt: skip
MISPRINTS = {
    ("qa", "em", WITHIN, "meta_adpt", "avg"): "the paper prints 36.4; the mean of its row is 46.9",
    ("qa", "f1", ZERO_SHOT, "attn", "sw"): "the paper prints 0.7/1.0 (F1/EM), but F1 is never below EM",
}


def _read() -> dict[tuple[str, str, str, str, str], float]:
    with Path(__file__).with_name("paper.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    keys = ("task", "metric", "setting", "row")
    return {
        (line["task"], line["metric"], line["setting"], line["row"], column): float(value)
        for line in lines
        for column, value in line.items()
        if column not in keys and value
    }


# Tables 2, 3, 6 and 7: (task, metric, setting, row, language or "avg") -> percent
SCORES = _read()

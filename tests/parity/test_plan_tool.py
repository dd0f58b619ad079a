"""tools/plan.py as a user runs it: the tables, the figures, the mistakes."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mlinterf_ds.data.corpus import Corpus
from mlinterf_ds.data.prepare.synthetic import prepare_synthetic
from mlinterf_ds.errors import UserError
from tools.plan.main import arguments, device_of, main

TOOL = Path(__file__).resolve().parents[2] / "tools" / "plan.py"


def test_tables_figures_and_numbers_agree(tmp_path: Path, capsys) -> None:
    words = ["--recipe", "base", "--nodes", "16", "--languages", "100", "--vocabulary", "250000"]
    assert main([*words, "--figures", str(tmp_path / "base"), "--json", str(tmp_path / "base.json")]) == 0
    printed = capsys.readouterr().out
    for text in (
        "988M parameters",
        "128 x h100, fp16",
        "fastest that fits:",
        "own modules",
        "all_reduce, tensor parallel",
    ):
        assert text in printed
    rows = json.loads((tmp_path / "base.json").read_text())
    assert {row["layout"]["tensor"] for row in rows} == {1, 2, 4}, "8 does not divide 12 heads"
    for row in rows:
        assert row["gib"] == pytest.approx(sum(row["memory"].values()) / 2**30)
        assert row["days"] == pytest.approx(sum(row["seconds"].values()) * 500_000 / 86400)
        assert row["fits"] == (row["gib"] * 2**30 <= 0.9 * 80e9)
    with (tmp_path / "base-gpus.csv").open() as file:
        drawn = {(row["gpus"], row["stage"]): float(row["gib"]) for row in csv.DictReader(file)}
    for row in rows:
        if row["layout"]["tensor"] == 1:
            assert drawn["128", str(row["layout"]["stage"])] == pytest.approx(row["gib"])
    for name in ("base-gpus", "base-languages"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000 and (tmp_path / f"{name}.svg").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--calibrate"], "--calibrate measures a GPU, and there is none here"),
        (["--nodes", "0"], "--nodes 0"),
        (["--recipe", "base", "--nodes", "3"], "train.batch=2048 cannot be divided over 24 GPUs"),
        (["--set", "train.micro_batch=5"], "in micro-batches of train.micro_batch=5"),
        (["--json", "no-such-folder/x.json"], r"x.json: cannot be written \(No such file or directory\)"),
    ],
)
def test_mistakes(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(words)


def test_a_corpus_is_counted(tmp_path: Path, capsys) -> None:
    prepare_synthetic(["syn", "syn-mid", "syn-far"], 300, folder=tmp_path / "corpus")
    pieces = f"{Corpus.open(tmp_path / 'corpus').vocabulary_size:,} pieces"
    main(["--set", f"corpus={tmp_path}/corpus", "--set", "variant=joint", "--gpu", "rtx4090"])
    printed = capsys.readouterr().out
    assert "joint, 3 languages" in printed and "none of one language" in printed and pieces in printed
    with pytest.raises(UserError, match="--languages 7: corpus=.* has 3"):
        main(["--set", f"corpus={tmp_path}/corpus", "--languages", "7"])
    with pytest.raises(UserError, match="not a prepared corpus"):
        main(["--set", "corpus=nowhere"])


def test_a_slower_network_takes_longer() -> None:
    words = ["--recipe", "base", "--nodes", "4", "--gpu", "rtx3090"]
    slow, fast = (device_of(arguments([*words, "--network", speed])).far for speed in ("10", "100"))
    assert (slow, fast) == (10e9 / 8 / 8, 100e9 / 8 / 8)


def test_the_command() -> None:
    done = subprocess.run([sys.executable, str(TOOL), "--nodes", "0"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "--nodes 0: expected 1 or more" in done.stderr and "Traceback" not in done.stderr


def test_a_plan_in_which_nothing_fits_suggests_changes(capsys) -> None:
    main(["--recipe", "large", "--set", "train.micro_batch=2048", "--set", "train.batch=16384", "--gpu", "a10"])
    assert "nothing fits a10: try more nodes, model.recompute=true" in capsys.readouterr().out

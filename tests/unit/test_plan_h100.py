"""Plans against what one H100 was measured to hold and to take, before layers were compiled and passes captured as graphs."""

import json
from dataclasses import asdict, replace

import pytest

from mlinterf_ds.errors import UserError
from mlinterf_ds.pretrain.config import load_run
from tools.plan import arithmetic, calibrate, pace

LARGE = ["train.batch=64", "train.micro_batch=32", "data.boundaries=none"]
SMALL = ["train.batch=128", "data.boundaries=none"]
H100 = arithmetic.DEVICES["h100"]


def planned(recipe: str, settings: list[str], stage: int, precision: str, vocabulary: int, languages: int):
    """(GiB of the rank, milliseconds of an average step) on one H100."""
    config, layout = load_run([recipe], settings), arithmetic.PlannedLayout(1, 1, stage, precision)
    count, rates = arithmetic.parameters(config, languages, vocabulary, 1), pace.Rates.expected(H100, precision)
    memory = arithmetic.memory(config, count, layout, vocabulary)
    memory["activations"] *= rates.held
    seconds = pace.compute_seconds(config, count, layout, rates, vocabulary)
    print({k: round(v / 2**30, 2) for k, v in memory.items()}, {k: round(1e3 * v, 1) for k, v in seconds.items()})
    return sum(memory.values()) / 2**30, 1e3 * sum(seconds.values())


@pytest.mark.parametrize(
    "recipe, settings, stage, precision, vocabulary, gib, milliseconds",
    [
        ("large", ["variant=joint", *LARGE], 2, "bf16", 200_000, 23.9, 145),
        ("large", ["variant=joint", *LARGE, "train.micro_batch=64"], 2, "bf16", 200_000, 36.0, 105),
        ("large", ["variant=adpt", *LARGE], 2, "bf16", 200_000, None, 187),
        ("large", ["variant=meta_adpt", *LARGE], 2, "bf16", 200_000, None, 772),
        ("paper", ["variant=joint"], 2, "fp16", 32_000, None, 127),
        ("paper", ["variant=meta_adpt"], 2, "fp16", 32_000, None, 679),
        ("paper_8heads", ["variant=joint", *SMALL], 0, "bf16", 32_000, None, 34.5),
        ("paper_8heads", ["variant=adpt", *SMALL], 0, "bf16", 32_000, None, 43.8),
    ],
)
def test_an_h100(recipe, settings, stage, precision, vocabulary, gib, milliseconds) -> None:
    memory, time = planned(recipe, settings, stage, precision, vocabulary, 2)
    assert time == pytest.approx(milliseconds, rel=0.25)
    assert gib is None or memory == pytest.approx(gib, rel=0.15)


@pytest.mark.xfail(strict=True, reason="what a meta step held beyond its vectors and one pass on the H100 is not known")
@pytest.mark.parametrize("languages, gib", [(2, 46.6), (64, 73.5)])
def test_memory_of_a_meta_step_on_an_h100(languages: int, gib: float) -> None:
    settings = ["variant=meta_adpt", *LARGE, "train.idle_languages=device"]
    memory, _ = planned("large", settings, 2, "bf16", 200_000, languages)
    assert memory == pytest.approx(gib, rel=0.15)


def test_launches_matter_where_passes_are_small() -> None:
    """Twice as many micro-batches take longer only where the host cannot keep up."""
    rates = pace.Rates.expected(H100, "bf16")

    def milliseconds(micro: int, launch: float) -> float:
        config = load_run(["large"], ["variant=joint", *LARGE, f"train.micro_batch={micro}"])
        count, layout = arithmetic.parameters(config, 2, 200_000, 1), arithmetic.PlannedLayout(1, 1, 2, "bf16")
        return 1e3 * sum(pace.compute_seconds(config, count, layout, replace(rates, launch=launch), 200_000).values())

    assert milliseconds(8, 36e-6) > 1.8 * milliseconds(16, 36e-6), "four passes of the host against eight"
    assert milliseconds(8, 1e-7) < 1.3 * milliseconds(64, 1e-7), "only sums of gradients are added"


def test_a_simultaneous_step_has_two_passes_less_and_holds_what_it_keeps() -> None:
    def step(*more: str) -> tuple[float, float]:
        return planned("large", ["variant=meta_adpt", *LARGE, *more], 2, "bf16", 200_000, 2)

    paper, kept = step("meta.radius=1e-3"), step("meta.order=simultaneous", "meta.radius=1e-3")
    assert kept[1] < 0.85 * paper[1] and kept[0] >= paper[0]
    assert step()[0] > paper[0] + 2, "a first step that tries radii holds a direction more"
    assert step("meta.batch=16", "train.micro_batch=16")[1] < step("train.micro_batch=16")[1], "fewer validation rows"


def test_rates_explain_the_steps_that_they_came_from(tmp_path, monkeypatch) -> None:
    """From the seconds that known rates give, `solve` finds these rates again; they are kept for later plans."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = load_run(["paper_8heads"], ["variant=joint", "train.batch=128", "train.micro_batch=128"])
    layout, count = arithmetic.PlannedLayout(1, 1, 0, "bf16"), arithmetic.parameters(config, 1, calibrate.VOCABULARY, 1)
    rates = pace.Rates(600e12, 100e12, 1e12, 2e12, 3e-5, 1.5)
    seconds = {}
    for name, rows, launch in (("few", 8, 3e-5), ("many", 128, 1e-9)):
        parts = pace.pass_seconds(config, layout, replace(rates, launch=launch), calibrate.VOCABULARY, rows)
        seconds[name] = sum(parts.values()) + pace.update_seconds(config, count, layout, rates)
    alone = replace(rates, elementwise=2e12, launch=1e-9)
    found = calibrate.solve(config, "bf16", 8, 128, seconds, alone)
    assert asdict(found) == pytest.approx(asdict(rates), rel=1e-6)
    path = calibrate.rates_file("h100")
    path.parent.mkdir()
    path.write_text(json.dumps({"bf16": asdict(found)}))
    assert calibrate.kept_rates("h100", "bf16") == found and calibrate.kept_rates("h100", "fp16") is None
    path.write_text('{"bf16": {"products": 0}}')
    with pytest.raises(UserError, match="rates-h100.json: not what plan.py --calibrate writes"):
        calibrate.kept_rates("h100", "bf16")


@pytest.mark.parametrize(
    "name, gpu",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000-ada"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Another", ""),
    ],
)
def test_names_of_devices(name: str, gpu: str) -> None:
    assert calibrate.known_as(name) == gpu

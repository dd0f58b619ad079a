"""What MFU counts: the rows that a step's passes see, and a row's products; how long a device is busy."""

import pytest
import torch

from mlinterf_ds.engine.throughput import flops_per_row, peak_flops, rows_passed
from mlinterf_ds.pretrain.config import load_run
from tools.bench.timing import covered


@pytest.mark.parametrize(
    "settings, rows",
    [
        (
            [],
            32 + 32 + 16 + 2 * 32 * 2 / 3,
        ),  # descent, phase 2, validation, two displaced passes without theta's gradients
        (["meta.difference=one_sided"], 32 + 32 + 16 + 32 * 2 / 3),
        (["meta.terms=direct"], 32 + 32 + 16),
        (["meta.order=simultaneous"], 32 + 16 + 2 * 32 * 2 / 3),
        (["meta.order=simultaneous", "meta.difference=one_sided"], 32 + 16 + 32 * 2 / 3),
        (["meta.every=4"], (32 + 32 + 16 + 2 * 32 * 2 / 3 + 3 * 32) / 4),
        (["variant=adpt"], 32),
    ],
    ids=str,
)
def test_rows_of_an_average_step(settings: list[str], rows: float) -> None:
    config = load_run([], ["variant=meta_adpt", "train.batch=32", "meta.batch=16", *settings])
    assert rows_passed(config.variant, config.meta, config.train.batch) == pytest.approx(rows)


def test_rows_of_a_plain_step() -> None:
    meta = load_run([], []).meta
    assert rows_passed("adpt", meta, 32, frozen=True) == pytest.approx(32 * 2 / 3)
    assert rows_passed("joint", meta, 32, apart=5) == 5 * 32


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
    ],
)
def test_peaks_of_devices_whose_names_begin_alike(name: str, peak: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == peak


def test_what_the_last_layer_leaves_out() -> None:
    """One layer of width 8, heads 8 wide in sum, feed-forward 16; 10 tokens, 3 of them predicted among 20 pieces."""
    model = load_run([], ["model.layers=1", "model.width=8", "model.heads=2", "model.ffn=16"]).model
    keys_and_values, the_rest = 2 * 2 * 8 * 8, 2 * (2 * 8 * 8 + 2 * 8 * 16 + 2 * 10 * 8)
    head = 2 * 3 * 8 * (8 + 20)
    assert flops_per_row(model, 10, 20, 3, "joint") == 3 * (10 * (keys_and_values + the_rest) + head)
    computed = flops_per_row(model, 10, 20, 3, "joint", as_computed=True)
    assert computed == 3 * (10 * keys_and_values + 3 * the_rest + head)


def test_time_that_kernels_cover_together() -> None:
    assert covered([]) == 0 and covered([(0, 5), (2, 3), (4, 9), (12, 13)]) == 10

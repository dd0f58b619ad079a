"""The micro-batch that is found by trying: sizes, recomputation where none fits."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mlinterf_ds.engine import fitting
from mlinterf_ds.errors import UserError
from mlinterf_ds.pretrain.config import load_run
from mlinterf_ds.runtime.parallel import Layout

CPU = torch.device("cpu")


PLANTED = torch.OutOfMemoryError("planted")


def limited(limit: int, tried: list[int], error: RuntimeError = PLANTED) -> Any:
    """An attempt that runs out of memory above this many rows."""

    def attempt(rows: int) -> None:
        tried.append(rows)
        if rows > limit:
            raise error

    return attempt


@pytest.fixture()
def alone(monkeypatch) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: None)


@pytest.mark.parametrize(
    "most, limit, size, tried",
    [(64, 100, 64, [64]), (96, 100, 64, [64]), (64, 17, 16, [64, 32, 16]), (64, 3, 0, [64, 32, 16, 8, 4]), (2, 9, 2, [2])],
)  # fmt: skip
def test_the_largest_power_of_two_that_fits(alone: None, most: int, limit: int, size: int, tried: list[int]) -> None:
    asked: list[int] = []
    assert fitting.largest(most, fitting.LEAST, limited(limit, asked), CPU) == size and asked == tried


def test_a_library_without_memory_is_too_large_a_size_and_another_error_is_none(alone: None) -> None:
    """cuBLAS takes memory of its own when the backward pass first multiplies, and says so in an error of its own."""
    full = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    assert fitting.largest(64, fitting.LEAST, limited(16, [], full), CPU) == 16
    with pytest.raises(RuntimeError, match="shape"):
        fitting.largest(64, fitting.LEAST, limited(16, [], RuntimeError("a wrong shape")), CPU)


class Device(SimpleNamespace):
    """An engine on an accelerator that holds `limit` rows of activations, eight times as many if they are recomputed."""

    def fit(self, monkeypatch: Any, most: int) -> str:
        def passes(engine: Any, batches: Any, vectors: int) -> None:
            limited(self.limit * (8 if self.layer.recompute else 1), [])(batches)

        largest = fitting.largest
        monkeypatch.setattr(fitting, "_pass_over", passes)
        monkeypatch.setattr(fitting, "largest", lambda most, least, attempt, _: largest(most, least, attempt, CPU))
        monkeypatch.setattr(fitting, "release", lambda _: None)
        return fitting.fit_micro_batch(self, most, lambda rows: rows, 2)  # type: ignore[arg-type, return-value]


def device(limit: int, stage: int = 2, tensor: int = 1) -> Device:
    layer = torch.nn.Identity()
    layer.recompute = False  # type: ignore[assignment]
    model = torch.nn.Sequential(layer)
    layout = Layout(0, tensor, tensor)
    return Device(
        limit=limit, device=torch.device("meta"), stage=stage, layout=layout, micro=64, model=model, layer=layer
    )


def test_activations_are_recomputed_only_where_none_fits(alone: None, monkeypatch) -> None:
    roomy, tight, lost = device(20), device(1), device(0)
    said = roomy.fit(monkeypatch, 64)
    assert roomy.micro == 16 and not roomy.layer.recompute and said == "micro-batches of 16 rows (auto)"
    assert "recomputed" in tight.fit(monkeypatch, 64) and tight.micro == 8 and tight.layer.recompute
    with pytest.raises(UserError, match="not even one row fits this meta.*higher ZeRO stage"):
        lost.fit(monkeypatch, 64)
    for untried in (device(0, stage=3), device(0, tensor=2)):
        assert "auto tries nothing" in untried.fit(monkeypatch, 64) and untried.micro == 16


def test_a_cpu_takes_all_rows_and_tries_nothing() -> None:
    engine: Any = SimpleNamespace(device=CPU, micro=24)
    assert fitting.fit_micro_batch(engine, 24, lambda rows: pytest.fail("tried"), 2) == "" and engine.micro == 24


@pytest.mark.parametrize("recipe", ["large", "base", "paper", "paper_8heads"])
def test_recipes_leave_the_micro_batch_to_the_device(recipe: str) -> None:
    config = load_run([recipe])
    assert config.train.micro_batch == "auto" and config.train.fixed_micro_batch is None and not config.model.recompute
    assert load_run([recipe], ["train.micro_batch=8"]).train.fixed_micro_batch == 8

"""What only a GPU can show: the same checks in fp16 on CUDA, through NCCL. Skips elsewhere."""

import argparse
import gc
from pathlib import Path
from unittest import mock

import pytest
import torch

from mlinterf_ds.data.stream import TrainStream
from mlinterf_ds.sections import RowFormat
from tests.parity import bodies, meta_bodies, test_step_costs
from tests.ranks import pool
from tools.bench import engines
from tools.plan import calibrate, pace

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("json_name", ["zero1", "zero2", "zero3", "zero2_offload"])
def test_training_in_fp16_learns_and_resumes(json_name: str, tmp_path: Path) -> None:
    settings = ["variant=meta_adpt", "train.precision=fp16", "train.steps=40"]
    (facts,) = pool(1).run(bodies.train, settings, json_name, 1, str(tmp_path), 40)
    assert facts[-1]["loss"] < facts[0]["loss"] and facts[-1]["skipped"] < 10


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("steps", [0, 200])
def test_the_mixed_product_on_the_device(precision: str, steps: int, tmp_path: Path) -> None:
    """At the start, and at a checkpoint of a run in fp32, as the tests on a CPU have it."""
    settings, source = ["variant=meta_adpt", "train.lr=0.003"], ""
    if steps:
        pool(1).run(bodies.train, ["variant=adpt", *settings[1:]], "zero1", 1, str(tmp_path), steps)
        source = str(tmp_path / "checkpoints" / f"step-{steps:08d}")
    measured = [*settings, f"train.precision={precision}"]
    (facts,) = pool(1).run(meta_bodies.mixed_products, measured, source, "sgd", "central")
    assert facts["cosine"] > 0.99, facts


def test_pinned_batches_are_copied_whole() -> None:
    batch = TrainStream(
        bodies.Made(), ["te"], rows=4, row_format=RowFormat(16, 0.15, "sentence", "boundary"), seed=0
    ).batch(0)
    pinned = batch.pinned()
    assert pinned.tokens.is_pinned() and pinned.position_ids.is_pinned() and not pinned.languages.is_pinned()
    assert torch.equal(pinned.to("cuda").tokens.cpu(), batch.tokens)


def test_calibration_explains_its_own_steps() -> None:
    (rates,) = pool(1).run(calibrated)
    assert 1e13 < rates.products < 3e15 and rates.elementwise > 1e11 and 1e-7 < rates.launch < 1e-3, rates


def calibrated() -> pace.Rates:
    with mock.patch("tools.bench.engines.start"):  # a rank of the pool has joined its group
        return calibrate.measure("bf16", few=4, many=64)


FAST = [["variant=joint"], ["variant=adpt"], ["variant=ffn"], ["variant=meta_adpt", "meta.check_every=4"]]
FAST += [["variant=adpt", "model.position_kind=rotary"], ["variant=joint", "data.mixed=true"]]
EAGER = ["model.compile=false", "train.graphs=false"]


@pytest.mark.parametrize("settings", [*FAST, ["variant=meta_adpt", "meta.order=simultaneous", "meta.reuse=true"]])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_graphs_replay_what_eager_passes_compute_bit_for_bit(settings: list[str], precision: str) -> None:
    """Dropout included; languages alternate, and the model has more of them on the host than on the device."""
    settings = [*settings, f"train.precision={precision}", "model.dropout=0.1", "model.attention_dropout=0.1"]
    ((facts, masters, captured),) = pool(1).run(test_step_costs.trained, [*settings, *EAGER], 12)
    fast = ["model.compile=false", "train.graphs=true", "train.idle_languages=host"]
    ((fast_facts, fast_masters, fast_captured),) = pool(1).run(test_step_costs.trained, [*settings, *fast], 12)
    assert captured == 0 < fast_captured
    assert facts == fast_facts and torch.equal(masters, fast_masters)


@pytest.mark.parametrize("settings", FAST)
def test_compiled_passes_give_the_same_losses_and_gradients(settings: list[str]) -> None:
    settings = [*settings, "train.precision=fp32", "train.lr=1e-6"]
    ((facts, masters, _),) = pool(1).run(test_step_costs.trained, [*settings, *EAGER], 8)
    fast = ["model.compile=true", "train.graphs=true"]
    ((fast_facts, fast_masters, captured),) = pool(1).run(test_step_costs.trained, [*settings, *fast], 8)
    assert captured
    torch.testing.assert_close(masters, fast_masters, rtol=1e-5, atol=1e-6)
    for ours, others in zip(facts, fast_facts, strict=True):
        for name in ("loss", "gradient_norm"):
            assert ours[name] == pytest.approx(others[name], rel=1e-5), name


def test_dropout_of_compiled_passes_is_replayed() -> None:
    """Else the difference of two passes at displaced weights would be noise."""
    settings = ["variant=meta_adpt", "train.precision=bf16", "model.dropout=0.1", "model.attention_dropout=0.1"]
    ((facts, _, _),) = pool(1).run(test_step_costs.trained, [*settings, "meta.check_every=1", "model.compile=true"], 8)
    assert min(fact["meta/self_check"] for fact in facts) > 0.9


def test_recomputed_activations_run_beside_graphs() -> None:
    """Such passes are not captured, since a capture may not read the state of the random numbers."""
    settings = ["variant=adpt", "model.recompute=true", "model.dropout=0.1", "train.precision=bf16"]
    ((facts, _, captured),) = pool(1).run(test_step_costs.trained, [*settings, "model.compile=false"], 6)
    assert not captured and facts[-1]["loss"] < facts[0]["loss"]


def captured() -> tuple[int, int]:
    """How many kinds of passes were captured, and how many streams have memory of graphs (in a rank of a pool)."""
    gc.collect()  # engines of other tests are in cycles, and their graphs' memory would be counted
    torch.cuda.empty_cache()
    settings = ["variant=meta_adpt", "model.compile=false", "train.graphs=true", "train.precision=bf16"]
    engine, stream, config = bodies.make(settings, "zero1")
    bodies.advance(engine, stream, config, 12, bodies.meta_step(engine, config, stream))
    segments = [segment for segment in torch.cuda.memory_snapshot() if tuple(segment["segment_pool_id"]) != (0, 0)]
    return len(engine.passes.captured), len({segment["stream"] for segment in segments})


def test_graphs_share_the_memory_of_their_activations() -> None:
    ((kinds, streams),) = pool(1).run(captured)
    assert kinds > 2 and streams == 1


def measured_batch() -> bool:
    """Whether a measurement's batch is copied while the host goes on, as a training batch is (in a rank of a pool)."""
    options = argparse.Namespace(vocabulary=1000, precision="bf16", set=["train.batch=4"])
    _, _, train, _ = engines.build(options, ["l0"], "tiny", ["variant=joint"], "zero0")
    return bool(train(0)[0].tokens.is_pinned())


def test_measurements_copy_their_batches_as_training_does() -> None:
    assert pool(1).run(measured_batch) == [True]

"""The same training at every layout: ZeRO stages, tensor and data parallel, accumulation, mixed batches."""

import itertools
import os
from pathlib import Path

import pytest
import torch

from mlinterf_ds.engine import checkpoint
from tests.parity import bodies
from tests.ranks import pool

STAGES = ["zero0", "zero1", "zero2", "zero3", "zero2_offload"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory):
    """One process, ZeRO 0: facts and final weights by settings."""
    known: dict[tuple[str, ...], tuple[list[dict[str, float]], dict[str, torch.Tensor]]] = {}

    def get(settings: list[str]):
        if tuple(settings) not in known:
            out = tmp_path_factory.mktemp("reference")
            facts = pool(1).run(bodies.train, settings, "zero0", 1, str(out))[0]
            known[tuple(settings)] = facts, bodies.weights(out / "checkpoints" / "step-00000004")
        return known[tuple(settings)]

    return get


def check(reference, settings: list[str], json_name: str, ranks: int, tensor: int, out: Path, extra: list[str]) -> None:
    wanted, weights = reference(settings)
    results = pool(ranks).run(bodies.train, settings + extra, json_name, tensor, str(out))
    for facts in results:
        for step, expected in zip(facts, wanted, strict=True):
            assert step == pytest.approx(expected, rel=1e-5, abs=1e-5)
    after = bodies.weights(out / "checkpoints" / "step-00000004")
    assert after.keys() == weights.keys()
    # Adam divides by the gradient's size: a weight whose gradient is round-off (a key bias) moves by up to lr.
    for name, value in weights.items():
        difference = (after[name] - value).abs()
        if "linear_qkv.bias" not in name:
            assert difference.max() < 2e-4 and difference.mean() < 1e-5, name


@pytest.mark.parametrize("json_name", STAGES)
@pytest.mark.parametrize("variant", ["adpt", "ffn"])
def test_data_parallel_equals_one_process(reference, json_name: str, variant: str, tmp_path: Path) -> None:
    check(reference, [f"variant={variant}"], json_name, 2, 1, tmp_path, [])


@pytest.mark.parametrize("json_name", ["zero0", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("variant", ["adpt", "attn", "share_adpt"])
def test_tensor_parallel_equals_one_process(reference, json_name: str, variant: str, tmp_path: Path) -> None:
    check(reference, [f"variant={variant}"], json_name, 2, 2, tmp_path, [])


@pytest.mark.parametrize("json_name", ["zero1", "zero2", "zero3"])
def test_both_at_once_with_accumulation_and_mixed_rows(reference, json_name: str, tmp_path: Path) -> None:
    settings = ["variant=adpt", "data.mixed=true"]
    check(reference, settings, json_name, 4, 2, tmp_path, ["train.micro_batch=1"])


@pytest.mark.parametrize("json_name, tensor", [("zero2", 1), ("zero3", 2)])
def test_rotary_positions_at_other_layouts(reference, json_name: str, tensor: int, tmp_path: Path) -> None:
    """With dropout off and on recomputed layers; a checkpoint holds no position table."""
    settings = ["variant=attn", "model.position_kind=rotary"]
    check(reference, settings, json_name, 2, tensor, tmp_path, ["model.recompute=true"])
    assert not any("position" in name for name in bodies.weights(tmp_path / "checkpoints" / "step-00000004"))


@pytest.mark.parametrize("json_name", STAGES)
def test_four_micro_batches_equal_one(reference, json_name: str, tmp_path: Path) -> None:
    check(reference, ["variant=adpt"], json_name, 1, 1, tmp_path, ["train.micro_batch=2"])


@pytest.mark.parametrize("json_name", STAGES)
@pytest.mark.parametrize("tensor", [1, 2])
def test_resume_is_bit_exact(json_name: str, tensor: int, tmp_path: Path) -> None:
    settings = ["variant=adpt", "model.dropout=0.1", "model.attention_dropout=0.1"]
    whole = pool(2).run(bodies.train, settings, json_name, tensor, str(tmp_path), 4, 2)
    source = tmp_path / "checkpoints" / "step-00000002"
    rest = pool(2).run(bodies.resumed, settings, json_name, tensor, str(source), 4)
    assert [facts[2:] for facts in whole] == rest


@pytest.mark.parametrize("json_name", ["zero0", "zero2"])
def test_a_checkpoint_written_while_training_goes_on_is_the_one_written_at_once(json_name: str, tmp_path: Path) -> None:
    pool(2).run(bodies.train_while_saving, ["variant=adpt"], json_name, str(tmp_path))
    folder, at_once = tmp_path / "checkpoints", tmp_path / "at_once" / "checkpoints" / "step-00000002"
    assert sorted(os.listdir(folder)) == ["step-00000002", "step-00000003"], "each is whole"
    assert checkpoint.verify(folder / "step-00000002") == checkpoint.verify(at_once)
    assert checkpoint.verify(folder / "step-00000003")["updates"] == 3
    for kind in ("master", "exp_avg_sq"):
        apart, together = bodies.weights(folder / "step-00000002", kind), bodies.weights(at_once, kind)
        assert all(torch.equal(apart[name], together[name]) for name in together)


def test_checkpoint_loads_at_another_layout(tmp_path: Path) -> None:
    settings = ["variant=adpt"]
    whole = pool(2).run(bodies.train, settings, "zero3", 2, str(tmp_path), 4, 2)[0]
    source = tmp_path / "checkpoints" / "step-00000002"
    for json_name, ranks, tensor in [("zero1", 1, 1), ("zero2", 2, 1), ("zero0", 2, 2)]:
        rest = pool(ranks).run(bodies.resumed, settings, json_name, tensor, str(source), 4)[0]
        for step, expected in zip(rest, whole[2:], strict=True):
            assert step == pytest.approx(expected, rel=1e-4)


def test_fp16_goes_through_overflow_scale_changes_and_resume(tmp_path: Path) -> None:
    facts, scales = pool(2).run(bodies.train_fp16, str(tmp_path / "whole"), 24)[0]
    skipped = [after["skipped"] - before["skipped"] for before, after in itertools.pairwise(facts)]
    assert facts[0]["skipped"] == 1 and scales[0] == 2.0**23, "the first scale overflows and is halved"
    assert 0 in skipped and max(scales[8:]) > min(scales), "later steps count, and the scale grows again"
    assert facts[-1]["loss"] < facts[0]["loss"]
    pool(2).run(bodies.train_fp16, str(tmp_path / "half"), 11)
    source = tmp_path / "half" / "checkpoints" / "step-00000011"
    rest, later = pool(2).run(bodies.train_fp16, str(tmp_path / "rest"), 24, str(source))[0]
    assert rest == facts[11:] and later == scales[11:]


def test_groups_of_the_same_ranks_are_one() -> None:
    """Every group of gloo has threads of its own, and megatron makes twenty groups for each layout."""
    first, *_, last = pool(4).run(bodies.groups, (1, 2, 4))
    assert first == [[0], [0, 1], [0, 1, 2, 3], [0, 2]] and last == [[0, 1, 2, 3], [1, 3], [2, 3], [3]]

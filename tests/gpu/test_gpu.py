"""What only a GPU can show: the same checks in fp16 on CUDA, through NCCL. Skips elsewhere."""

from pathlib import Path

import pytest
import torch

from tests.parity import bodies, meta_bodies
from tests.ranks import pool

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("json_name", ["zero1", "zero2", "zero3", "zero2_offload"])
def test_training_in_fp16_learns_and_resumes(json_name: str, tmp_path: Path) -> None:
    settings = ["variant=meta_adpt", "train.precision=fp16", "train.steps=40"]
    (facts,) = pool(1).run(bodies.train, settings, json_name, 1, str(tmp_path), 40)
    assert facts[-1]["loss"] < facts[0]["loss"] and facts[-1]["skipped"] < 10


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("warm", [0, 200])
def test_the_mixed_product_on_the_device(precision: str, warm: int) -> None:
    settings = ["variant=meta_adpt", f"train.precision={precision}", "train.lr=0.003"]
    (facts,) = pool(1).run(meta_bodies.mixed_products, settings, warm, "sgd", "central")
    assert facts["cosine"] > 0.99, facts

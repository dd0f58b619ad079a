"""The micro-batch that is found by trying: ranks agree on it, and trying changes nothing of what comes after."""

import pytest
import torch
import torch.distributed as dist

from mlinterf_ds.engine import fitting
from tests.parity import bodies
from tests.ranks import pool
from tests.unit.test_fitting import limited


def largest_on_ranks() -> int:
    return fitting.largest(32, 1, limited(8 + 24 * (1 - dist.get_rank()), []), torch.device("cpu"))


def test_ranks_take_what_fits_all_of_them() -> None:
    assert pool(2).run(largest_on_ranks) == [8, 8]


def steps(settings: list[str], json_name: str, tried: bool) -> list[dict[str, float]]:
    """Facts of two steps, after passes were tried or not."""
    engine, stream, config = bodies.make([*settings, "model.dropout=0.1"], json_name)
    if tried:
        fitting._pass_over(engine, [stream.batch(0, 0, 8), stream.batch(0, 0, 8)], 2)
    return bodies.advance(engine, stream, config, 2, bodies.meta_step(engine, config, stream))


@pytest.mark.parametrize("variant, json_name, ranks", [("meta_adpt", "zero1", 1), ("adpt", "zero2", 2)])
def test_trying_leaves_nothing_behind(variant: str, json_name: str, ranks: int) -> None:
    plain, after = (pool(ranks).run(steps, [f"variant={variant}"], json_name, tried) for tried in (False, True))
    assert [[dict(facts) for facts in of_rank] for of_rank in plain] == [
        [dict(facts) for facts in of_rank] for of_rank in after
    ]

"""Parameter groups whose masters lie on another device than the model, without a process group."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mlinterf_ds.engine.space import Space


class Offloaded(Space):
    """A group of two elements: the masters on the CPU, the working weights on a device that stands in for a GPU."""

    def __init__(self) -> None:
        super().__init__("shared", {"weight": nn.Parameter(torch.empty(2, device="meta"))})
        self.masters, self._counted = [torch.tensor([3.0, 4.0])], [(0, 0, 2)]


def test_products_of_offloaded_vectors_join_the_facts_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor takes all facts to the host, so that they must lie on one device."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    space = Offloaded()
    for scalar in (space.dot(space.masters, space.masters), space.weights_norm()):
        assert scalar.device == space.device == torch.device("meta")

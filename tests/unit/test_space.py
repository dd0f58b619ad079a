"""Parameter groups whose masters lie on another device than the model, without a process group."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mlinterf_ds.engine import space
from mlinterf_ds.engine.space import Space


class Offloaded(Space):
    """A group of two elements: the masters on the CPU, the working weights on a device that stands in for a GPU."""

    def __init__(self) -> None:
        super().__init__("shared", {"weight": nn.Parameter(torch.empty(2, device="meta"))})
        self.masters, self._counted = [torch.tensor([3.0, 4.0])], [(0, 0, 2)]


def test_products_of_many_elements_are_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's dot product takes fewer than 2**31 elements."""
    group, values = Offloaded(), torch.arange(1.0, 38.0)
    lengths: list[int] = []
    dot = torch.dot
    monkeypatch.setattr(torch, "dot", lambda left, right: (lengths.append(len(left)), dot(left, right))[1])
    monkeypatch.setattr(space, "MOST", 8)
    for counted in ([(0, 0, 37)], [(0, 0, 20), (0, 20, 37)]):
        group._counted = counted
        assert float(group.share_of_dot([values], [values])) == float((values * values).sum())
    assert max(lengths) == 8


def test_products_of_offloaded_vectors_join_the_facts_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor takes all facts to the host, so that they must lie on one device."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    group = Offloaded()
    for scalar in (group.dot(group.masters, group.masters), group.weights_norm()):
        assert scalar.device == group.device == torch.device("meta")

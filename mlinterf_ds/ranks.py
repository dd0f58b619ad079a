"""What the ranks of a job tell each other about files and mistakes; without a process group there is one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from mlinterf_ds.errors import UserError

Found = TypeVar("Found")


def from_first(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def together() -> None:
    """Wait until all ranks are here."""
    if dist.is_initialized():
        dist.barrier()


def agreed(find: Callable[[], Found]) -> Found:
    """What rank 0 finds, or the mistake that it finds, on every rank."""
    found: Any = None
    problem = ""
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            found = find()
        except UserError as error:
            problem = str(error)
    found, problem = from_first((found, problem))
    if problem:
        raise UserError(problem)
    return found

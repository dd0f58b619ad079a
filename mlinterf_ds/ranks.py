"""Agreement of a job's ranks on values, files and mistakes; without a process group there is one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from mlinterf_ds.errors import UserError

Value = TypeVar("Value")


def from_first(value: Any) -> Any:
    """Returns rank 0's value on every rank."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def wait_for_all() -> None:
    """Return when all ranks have called this."""
    if dist.is_initialized():
        dist.barrier()


def agreed(read: Callable[[], Value]) -> Value:
    """Returns on every rank what rank 0 reads; a UserError of rank 0 is raised on every rank."""
    value: Any = None
    problem: UserError | None = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            value = read()
        except UserError as error:
            problem = type(error)(str(error))  # without its trace and cause, which cannot be sent
    value, problem = from_first((value, problem))
    if problem:
        raise problem
    return value


def agreed_by_all(check: Callable[[], None]) -> None:
    """Every rank checks its own part; the first rank's UserError is raised on every rank."""
    problem: UserError | None = None
    try:
        check()
    except UserError as error:
        problem = type(error)(str(error))
    problems = [problem]
    if dist.is_initialized():
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
    if first := next(filter(None, problems), None):
        raise first

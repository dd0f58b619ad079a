"""Downstream tasks (paper, section 3.2): entities, parts of speech, question answering, inference.

A task reads its published files, turns examples into rows for the encoder, turns the model's outputs into predictions,
scores them and writes them in the task's format. A new task is a class in a file of its own, and an entry of TASKS.
"""

from typing import TYPE_CHECKING, Literal

from mlinterf_ds.tasks.base import Limits, Row, Task
from mlinterf_ds.tasks.ner import Ner
from mlinterf_ds.tasks.nli import Nli
from mlinterf_ds.tasks.pos import Pos
from mlinterf_ds.tasks.qa import Qa

__all__ = ["TASKS", "Limits", "Row", "Task", "TaskName"]

TASKS: dict[str, Task] = {task.name: task for task in (Ner(), Pos(), Qa(), Nli())}
if TYPE_CHECKING:
    TaskName = str
else:  # the type of the configurations' key `task`: a name in TASKS, which `--help` lists
    TaskName = Literal[tuple(TASKS)]

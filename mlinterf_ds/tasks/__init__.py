"""Downstream tasks (paper section 3.2): entities, parts of speech, question answering, inference.

`TASKS[name]` reads a task's published files, turns examples into rows for the encoder, reads predictions off the
model's outputs, scores them and writes them back in the task's format.
"""

from mlinterf_ds.tasks.base import Limits, Row, Task
from mlinterf_ds.tasks.ner import Ner
from mlinterf_ds.tasks.nli import Nli
from mlinterf_ds.tasks.pos import Pos
from mlinterf_ds.tasks.qa import Qa

__all__ = ["TASKS", "Limits", "Row", "Task"]

TASKS: dict[str, Task] = {task.name: task for task in (Ner(), Pos(), Qa(), Nli())}

"""Models, jobs and units: what a study trains, what it starts, and what runs inside.

A job is one set of processes. It pretrains a model, fine-tunes a model on all tasks, or runs all analyses of a model; each of
these runs is a unit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["pretrain", "finetune", "analyze"]
VOCABULARY = "vocabulary"  # the control whose models have a vocabulary of their language alone
# The module with the command of each kind.
COMMANDS = {
    "pretrain": "mlinterf_ds.pretrain.main",
    "finetune": "mlinterf_ds.finetune.main",
    "analyze": "mlinterf_ds.analysis.main",
}


@dataclass(frozen=True)
class Model:
    """One pretrained model of the grid."""

    set: str  # the set's name; for a monolingual model its language, as LANG@N if only N sentences are kept
    kind: str  # the set's kind, or "mono"
    languages: tuple[str, ...]
    variant: str
    seed: int
    settings: tuple[str, ...] = ()
    limits: tuple[tuple[str, int], ...] = ()  # (language, training sentences kept)
    control: str = ""  # "direct", "held_out", "compute", "batch", "rows", "text" or "vocabulary" (see ControlsSection)
    half: str = ""  # of a null control: the code of the language's other half

    @property
    def name(self) -> str:
        return f"{self.variant}{'-' + self.control if self.control else ''}.{self.set}.seed{self.seed}"

    @property
    def facts(self) -> dict[str, Any]:
        """The model's columns in the records."""
        names = ("set", "kind", "variant", "seed", "control")
        return {name: getattr(self, name) for name in names} | {"languages": list(self.languages)}


@dataclass(frozen=True)
class Unit:
    """One run of a command, in a folder of its own that holds a summary.json when the run has finished."""

    name: str
    arguments: tuple[str, ...]  # the launcher's; output, checkpoint and tracking are added when the job is written
    facts: dict[str, Any]  # what the records and the cost estimate need to know about the run
    identity: Any = field(repr=False, default=None)  # everything that decides its results, as JSON values


@dataclass(frozen=True)
class Job:
    """One set of processes, which runs its units one after the other."""

    name: str
    kind: Kind
    model: Model
    units: tuple[Unit, ...]
    needs: tuple[Job, ...]  # these must finish first
    digest: str  # hash of everything that decides the results

    @property
    def folder(self) -> str:
        """The job's folder, relative to the study's output."""
        return f"jobs/{self.name}-{self.digest[:10]}"

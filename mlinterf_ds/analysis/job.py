"""The checkpoint, corpus and folder that an analysis works with on each rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mlinterf_ds.analysis.config import AnalyzeConfig
from mlinterf_ds.data.corpus import Corpus
from mlinterf_ds.engine import checkpoint
from mlinterf_ds.engine.engine import Engine
from mlinterf_ds.errors import UserError
from mlinterf_ds.pretrained import Pretrained
from mlinterf_ds.runtime.parallel import Layout
from mlinterf_ds.sections import TrainConfig

MOST_NAMED = 8  # languages that a caption names; of more it says the number
Report = Callable[[Mapping[str, float], int], None]  # takes metrics and their step


@dataclass(frozen=True)
class AnalysisJob:
    """One analysis on this rank. `pretrained` and `corpus` are None where the analysis takes no checkpoint."""

    config: AnalyzeConfig
    pretrained: Pretrained | None
    corpus: Corpus | None
    languages: tuple[str, ...]  # analysed ones; a batch carries a language's index among the model's
    layout: Layout
    device: torch.device
    deepspeed_json: dict[str, Any]
    precision: str
    output: Path  # figures, CSV and JSON go here; only `first` writes
    log: Report  # to the tracker on rank 0; on other ranks it does nothing

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes and prints."""
        return self.layout.rank == 0

    @property
    def model(self) -> Pretrained:
        """The checkpoint; only for an analysis that takes one."""
        assert self.pretrained is not None, "analyze.py refuses a missing checkpoint"
        return self.pretrained

    @property
    def described(self) -> str:
        """The checkpoint and its corpus in words, for captions."""
        variant, codes = self.model.saved["config"]["variant"], self.model.languages
        languages = ", ".join(codes) if len(codes) <= MOST_NAMED else f"{len(codes)} languages"
        return f"{variant} on {languages}, step {self.model.step}, text of {self.text.folder.name}"

    @property
    def text(self) -> Corpus:
        """The corpus; only for an analysis that takes one."""
        assert self.corpus is not None, "opened with the checkpoint"
        return self.corpus

    def engine(self, rows: int, micro_batch: int | None = None) -> Engine:
        """An engine with the checkpoint's weights and no dropout, for global batches of `rows` rows.

        micro_batch: rows a rank handles at once (default: all of its rows).
        """
        from mlinterf_ds.model.encoder import Encoder

        if rows % self.layout.data:
            raise UserError(
                f"{rows} rows cannot be shared by {self.layout.data} data-parallel ranks: take a multiple of them"
            )
        self.model.check(self.layout.tensor)
        training = TrainConfig.model_validate({"batch": rows, "micro_batch": micro_batch})
        encoder = Encoder(**self.model.architecture(dropout=0.0))
        engine = Engine(encoder, training, self.deepspeed_json, self.precision, self.layout)
        checkpoint.load(self.model.path, engine, moments=False)
        return engine

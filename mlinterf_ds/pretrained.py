"""Opens a checkpoint of a pretraining or of a fine-tuning; every later use of a checkpoint goes through this file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from mlinterf_ds.config import with_present_keys
from mlinterf_ds.data.tokenizer import Tokenizer
from mlinterf_ds.engine import checkpoint
from mlinterf_ds.engine.space import Segment
from mlinterf_ds.engine.weights import CheckpointReader, Weights
from mlinterf_ds.errors import UserError, refusing
from mlinterf_ds.files import read_json
from mlinterf_ds.ranks import agreed
from mlinterf_ds.sections import ModelConfig, RowFormat, architecture, has_adapters

if TYPE_CHECKING:  # reading a checkpoint needs neither DeepSpeed nor megatron
    from mlinterf_ds.model.encoder import Encoder
    from mlinterf_ds.runtime.parallel import Layout

AnyEncoder = TypeVar("AnyEncoder", bound="Encoder")


@dataclass(frozen=True)
class Pretrained:
    """A verified checkpoint of a pretraining run."""

    path: Path
    saved: dict[str, Any]  # run.json

    @classmethod
    def open(cls, folder: str) -> Pretrained:
        """The best checkpoint of a run's output folder, or the checkpoint of that folder."""
        return cls.of(*_best(folder))

    @classmethod
    def of(cls, path: Path, saved: dict[str, Any]) -> Pretrained:
        """The checkpoint at `path`, whose run.json is `saved`. UserError if it is a fine-tuning's."""
        if "task" in saved.get("config", {}):
            raise UserError(
                f"{path}: a checkpoint of a fine-tuning: set checkpoint to a pretraining run's output folder"
            )
        return cls(path, saved | {"config": with_present_keys(saved["config"])})

    @property
    def languages(self) -> list[str]:
        return list(self.saved["languages"])

    @property
    def variant(self) -> str:
        """The architecture: which module is language-specific."""
        return architecture(self.saved["config"]["variant"])

    @property
    def run_variant(self) -> str:
        """The variant of the run, which also says how its language-specific modules were trained."""
        return str(self.saved["config"]["variant"])

    @property
    def step(self) -> int:
        """The step of the checkpoint, skipped steps included."""
        return int(self.saved["updates"]) + int(self.saved["skipped"])

    @property
    def positions(self) -> int:
        """The longest row, in pieces: of its pretraining, or of the model that it started from."""
        return self.shape().longest_row or int(self.saved["config"]["data"]["sequence_length"])

    @property
    def origin(self) -> dict[str, Any]:
        """What a model that came from a `transformers` folder keeps of that folder's config.json; empty for others."""
        return dict(self.saved.get("origin", {}))

    @property
    def row_format(self) -> RowFormat:
        """The rules by which text became rows in its pretraining."""
        data = self.saved["config"]["data"]
        return RowFormat(int(data["sequence_length"]), float(data["mask"]), data["boundaries"], data["positions"])

    def shape(self, dropout: float | None = None) -> ModelConfig:
        """The shape of the encoder, with the given dropouts in place of the checkpoint's."""
        changed = {} if dropout is None else {"dropout": dropout, "attention_dropout": dropout}
        return ModelConfig(**(self.saved["config"]["model"] | changed))

    def architecture(self, dropout: float | None = None) -> dict[str, Any]:
        """The arguments with which `Encoder` builds this model, without weights; given dropouts replace the checkpoint's."""
        return {
            "config": self.shape(dropout),
            "variant": self.variant,
            "languages": self.languages,
            "vocabulary": int(self.saved["vocabulary"]),
            "positions": self.positions,
        }

    def check(self, tensor: int) -> None:
        """UserError unless the model can be cut for this many tensor-parallel ranks."""
        shape = self.shape()
        adapter = shape.adapter_width if has_adapters(self.variant) else 0
        for key, value in (("heads", shape.heads), ("ffn", shape.ffn), ("adapter", adapter)):
            if value % tensor:
                raise UserError(f"{self.path}: model.{key}={value} is not divisible by {tensor} tensor-parallel ranks")

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.path / "tokenizer.model")

    def encoder(self, layout: Layout, device: torch.device, dtype: torch.dtype) -> Encoder:
        """The model at this layout, whatever layout saved it, without dropout and for evaluation: no engine, no moments."""
        from mlinterf_ds.model.encoder import Encoder

        self.check(layout.tensor)
        return self.filled(Encoder(**self.architecture(dropout=0.0)), layout).to(device, dtype).eval()

    def filled(self, model: AnyEncoder, layout: Layout) -> AnyEncoder:
        """The model, built of `architecture`, with the checkpoint's weights."""
        return filled(model, CheckpointReader(self.path), layout)


def filled(model: AnyEncoder, weights: Weights, layout: Layout) -> AnyEncoder:
    """The model with these weights, at this layout."""
    from mlinterf_ds.model.encoder import partition_dim

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            size = tuple(parameter.shape)
            whole = Segment(name, size, 0, parameter.numel(), 0, 0, partition_dim(parameter))
            parameter.copy_(weights.read(whole, "master", layout.tensor, layout.tensor_rank).view(size))
    return model


@dataclass(frozen=True)
class Point:
    """A fine-tuning's seed and point of the grid."""

    seed: int
    batch: int
    lr: float
    head_lr: float

    @property
    def name(self) -> str:
        """The name of the folder of this fine-tuning."""
        head = "" if self.head_lr == self.lr else f"-head{self.head_lr:g}"
        return f"seed{self.seed}-batch{self.batch}-lr{self.lr:g}{head}"


@dataclass(frozen=True)
class Finetuned:
    """A verified checkpoint of a fine-tuning: an encoder, and a task's classifier on it."""

    path: Path
    saved: dict[str, Any]  # run.json

    @classmethod
    def open(cls, folder: str) -> Finetuned:
        """The best checkpoint of a fine-tuning's output folder, of one of its seed... folders, or the checkpoint of that folder."""
        model = opened(folder)
        if isinstance(model, Pretrained):
            raise UserError(
                f"{model.path}: a checkpoint of a pretraining, which has no classifier: fine-tune it with launch/finetune.py, "
                "or fill masks with launch/evaluate.py"
            )
        return model

    @property
    def pretrained(self) -> Pretrained:
        """The encoder, with the weights that the fine-tuning gave it."""
        return Pretrained(self.path, self.saved | {"config": with_present_keys(self.saved["pretrained"])})

    @property
    def is_best(self) -> bool:
        """Whether the checkpoint is of the epoch that was the best on the dev sets, as far as its training had come."""
        return bool(self.pretrained.step == self.saved["progress"]["best_step"])

    @property
    def labels(self) -> list[str]:
        """The names of the classes, in the order of the classifier's outputs."""
        return list(self.saved["labels"])

    @property
    def summary(self) -> dict[str, Any]:
        """The summary.json of the fine-tuning's command, if the checkpoint lies in its folder and the summary is of it; or {}."""
        path = self.path.resolve()
        file = path.parents[2] / "summary.json" if len(path.parents) > 2 else Path()
        if not file.is_file() or not self.is_best:
            return {}
        with refusing(f"{file}: not what a fine-tuning writes"):
            summary: dict[str, Any] = read_json(file)
            points = [Point(seed, **summary["chosen"]).name for seed in summary.get("seeds", []) if "task" in summary]
        return summary if path.parents[1].name in points else {}


def opened(folder: str) -> Pretrained | Finetuned:
    """The best checkpoint of an output folder, or the checkpoint of that folder, be it of a pretraining or of a fine-tuning.

    Of a fine-tuning with several seeds it is the first seed's at the chosen point of the grid.
    """
    path = Path(folder)
    if (path / "job.json").is_file() and "units" in (job := _job(path)):
        raise UserError(
            f"{path}: a job of a study: name one of its folders, {', '.join(u['name'] for u in job['units'])}"
        )
    if (path / "job.json").is_file():
        if not (path / "summary.json").is_file():
            raise UserError(f"{path}: the fine-tuning is not finished; name one of its seed... folders")
        with refusing(f"{path / 'summary.json'}: not what a fine-tuning writes"):
            summary = read_json(path / "summary.json")
            path /= Point(summary["seeds"][0], **summary["chosen"]).name

    best, saved = _best(path)
    return Finetuned(best, saved) if "labels" in saved else Pretrained.of(best, saved)


def _job(folder: Path) -> dict[str, Any]:
    with refusing(f"{folder / 'job.json'}: not what a fine-tuning writes"):
        return dict(read_json(folder / "job.json"))


def _best(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    """The best checkpoint of an output folder, or the checkpoint of that folder, and its run.json."""
    path = agreed(lambda: checkpoint.find(folder, "best"))
    return path, checkpoint.verify(path)

"""An exported folder as a model of MLflow's `pyfunc` flavour, and in MLflow's registry.

The model fills masks, tags words, classifies texts or answers questions.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

REQUIREMENTS = ["mlinterf_ds", "torch", "transformers>=5", "pandas"]  # packages that a registered model needs
LANGUAGE = "language"  # the column that models with language-specific modules read
# The columns of a request by the ending of the model's class; models with language-specific modules also read LANGUAGE.
COLUMNS = {
    "ForMaskedLM": ["text"],
    "ForTokenClassification": ["text"],
    "ForSequenceClassification": ["text", "text_pair"],
    "ForQuestionAnswering": ["question", "context"],
}


def kind_of(folder: Path) -> str:
    """The ending of the class of a folder's model: a key of COLUMNS."""
    (architecture,) = json.loads((folder / "config.json").read_bytes())["architectures"]
    return "For" + str(architecture).rpartition("For")[2]


def _load_pyfunc(path: str) -> Model:
    """Loads the model of the folder that was logged; MLflow calls it."""
    return Model(Path(path))


class Model:
    """Answers a request row by row, through the modules of the row's language where the model has such."""

    def __init__(self, folder: Path):
        from transformers import pipeline

        self.kind = kind_of(folder)
        names = {
            "ForMaskedLM": "fill-mask",
            "ForTokenClassification": "token-classification",
            "ForSequenceClassification": "text-classification",
            "ForQuestionAnswering": "question-answering",
        }
        # The classes of a model with language-specific modules are files of the folder.
        self.pipeline = pipeline(names[self.kind], str(folder), trust_remote_code=True)
        self.routed = self.pipeline.model.config.model_type == "mlinterf"
        self.default = getattr(self.pipeline.model.config, "default_language", None)  # of X-MOD

    def predict(self, frame: Any, params: dict[str, Any] | None = None) -> list[str]:
        """Returns one text for each row of the frame, which has the columns that COLUMNS and LANGUAGE name.

        By the model's class it is the text with every `<mask>` filled, the labels of the words with spaces between them, the
        label of the text or pair, or the answer.
        """
        answer: Callable[..., str] = {
            "ForMaskedLM": self._filled,
            "ForTokenClassification": self._tags,
            "ForSequenceClassification": self._label,
            "ForQuestionAnswering": self._answer,
        }[self.kind]
        answers = []
        for row in frame.to_dict("records"):
            name = row.get(LANGUAGE)
            name = name if isinstance(name, str) else ""  # a frame has NaN where a row lacks it
            if not self.routed and hasattr(self.pipeline.model, "set_default_language"):  # X-MOD
                if not (named := name or self.default):
                    raise ValueError(f"a row has no {LANGUAGE}, and the model no default: name one in each row")
                self.pipeline.model.set_default_language(named)
            answers.append(answer(row, **({LANGUAGE: name} if name and self.routed else {})))
        return answers

    def _filled(self, row: dict[str, str], **language: str) -> str:
        import torch

        model, tokenizer = self.pipeline.model, self.pipeline.tokenizer
        tokens = tokenizer(row["text"], return_tensors="pt")
        with torch.no_grad():
            best = model(**tokens, **language).logits[0].argmax(-1)
        ids = tokens["input_ids"][0]
        text: str = tokenizer.decode(torch.where(ids == tokenizer.mask_token_id, best, ids), skip_special_tokens=True)
        return text

    def _tags(self, row: dict[str, str], **language: str) -> str:
        """The label of each word, by its first piece or by the mean of all (`finetune.word`); words are what white space separates.

        Raises ValueError for a text that is longer than a row of the model.
        """
        import torch

        model, tokenizer, words = self.pipeline.model, self.pipeline.tokenizer, row["text"].split()
        if not words:
            return ""
        of_words = tokenizer(words, add_special_tokens=False)["input_ids"]
        # as in the fine-tuning, a word without pieces is read as an unknown one
        words = [word if ids else tokenizer.unk_token for word, ids in zip(words, of_words, strict=True)]
        places = {"return_offsets_mapping": True, "return_special_tokens_mask": True}
        tokens = tokenizer(" ".join(words), return_tensors="pt", truncation=True, **places).to(model.device)
        offsets, special = (tokens.pop(name)[0].tolist() for name in ("offset_mapping", "special_tokens_mask"))
        with torch.no_grad():
            rows = model(**tokens, **language).logits[0].float()
        pieces = [(*span, logits) for span, skipped, logits in zip(offsets, special, rows, strict=True) if not skipped]
        tags, end = [], 0
        for word in words:
            start, end = end, end + len(word)
            own = [logits for begin, last, logits in pieces if last > start and begin < end]
            if not own:
                raise ValueError(
                    f"the text has more than the {tokenizer.model_max_length} pieces that the model reads at once, {row['text'][:40]!r}: "
                    "give a sentence in each row"
                )
            read = own if model.config.finetuned.get("word") == "mean" else own[:1]
            tags.append(model.config.id2label[int(sum(read).argmax())])
            end += 1  # the space
        return " ".join(tags)

    def _label(self, row: dict[str, str], **language: str) -> str:
        pair = {"text_pair": row["text_pair"]} if row.get("text_pair") else {}
        label: str = self.pipeline({"text": row["text"], **pair}, truncation=True, **language)["label"]
        return label

    def _answer(self, row: dict[str, str], **language: str) -> str:
        answer: str = self.pipeline(question=row["question"], context=row["context"], **language)["answer"]
        return answer


def register(folder: Path, name: str, run_id: str | None, model: str, tags: Mapping[str, str]) -> str:
    """Logs an exported folder as `model` in a run (None: in a new one) and registers it under `name`; returns its version.

    The version has the folder's card as its description. MLflow's tracking address must be set.
    """
    import mlflow
    from mlflow.models.signature import ModelSignature
    from mlflow.types.schema import ColSpec, Schema

    config = json.loads((folder / "config.json").read_bytes())
    # Models without language-specific modules don't read the language, and others may have a default.
    needed = "languages" in config and "default_language" not in config
    language = ColSpec("string", LANGUAGE, required=needed)
    kind = kind_of(folder)
    columns = [ColSpec("string", column, required=column != "text_pair") for column in COLUMNS[kind]]
    with warnings.catch_warnings(), mlflow.start_run(run_id=run_id, run_name=None if run_id else folder.name):
        warnings.filterwarnings("ignore", message=".*input example.*")  # with one MLflow would run the model here
        mlflow.pyfunc.log_model(
            name=model, loader_module="mlinterf_ds.export.pyfunc", data_path=str(folder),
            pip_requirements=REQUIREMENTS, registered_model_name=name,
            signature=ModelSignature(inputs=Schema([*columns, language]), outputs=Schema([ColSpec("string")])),
        )  # fmt: skip
    client = mlflow.MlflowClient()
    version = str(max(int(version.version) for version in client.search_model_versions(f"name='{name}'")))
    client.update_model_version(name, version, description=(folder / "README.md").read_text("utf-8"))
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, value)
    return version

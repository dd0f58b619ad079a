"""An exported folder as a model of MLflow's `pyfunc` flavour: it fills masks, tags words, classifies texts or answers questions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

MASK = "<mask>"
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
            language = {LANGUAGE: row[LANGUAGE]} if row.get(LANGUAGE) else {}
            if language and not self.routed and hasattr(self.pipeline.model, "set_default_language"):  # X-MOD
                self.pipeline.model.set_default_language(row[LANGUAGE])
            answers.append(answer(row, **(language if self.routed else {})))
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
        """The label of each word's first piece; words are what white space separates."""
        words = row["text"].split()
        pieces = self.pipeline(" ".join(words), ignore_labels=[], **language) if words else []
        tags, end = [], 0
        for word in words:
            start, end = end, end + len(word)
            tags.append(next((piece["entity"] for piece in pieces if piece["end"] > start), "O"))
            end += 1  # the space
        return " ".join(tags)

    def _label(self, row: dict[str, str], **language: str) -> str:
        pair = {"text_pair": row["text_pair"]} if row.get("text_pair") else {}
        label: str = self.pipeline({"text": row["text"], **pair}, truncation=True, **language)["label"]
        return label

    def _answer(self, row: dict[str, str], **language: str) -> str:
        answer: str = self.pipeline(question=row["question"], context=row["context"], **language)["answer"]
        return answer

"""Pipelines of `transformers` that take a language, and one that answers questions. Exported folders hold a copy of this file.

fill = transformers.pipeline("fill-mask", FOLDER, trust_remote_code=True)
fill("Habari ya <mask>", language="sw")
answer = transformers.pipeline("question-answering", FOLDER, trust_remote_code=True)
answer(question="...", context="...")
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from transformers import (
    FeatureExtractionPipeline,
    FillMaskPipeline,
    Pipeline,
    TextClassificationPipeline,
    TokenClassificationPipeline,
)


class _WithLanguage:
    """Passes `language`, a code for all texts of a call, on to the model."""

    def _sanitize_parameters(self, language: str | None = None, **others: Any) -> tuple[dict, dict, dict]:
        before, forward, after = super()._sanitize_parameters(**others)  # type: ignore[misc]
        return before, forward | ({"language": language} if language else {}), after

    def _forward(self, model_inputs: dict[str, Any], language: str | None = None) -> Any:
        return super()._forward({**model_inputs, "language": language})  # type: ignore[misc]


class FillMask(_WithLanguage, FillMaskPipeline):
    """The task `fill-mask`."""


class FeatureExtraction(_WithLanguage, FeatureExtractionPipeline):
    """The task `feature-extraction`: hidden states of the encoder's last layer."""


class TokenClassification(_WithLanguage, TokenClassificationPipeline):
    """The task `token-classification` or `ner`."""

    def _forward(self, model_inputs: dict[str, Any], language: str | None = None) -> Any:
        outputs = super()._forward(model_inputs, language)
        outputs.pop("language")  # the outputs repeat the inputs, which hold it
        return outputs


class TextClassification(_WithLanguage, TextClassificationPipeline):
    """The task `text-classification`, of texts or of pairs: {"text": ..., "text_pair": ...}. Long ones are cut."""

    def _sanitize_parameters(self, language: str | None = None, **others: Any) -> tuple[dict, dict, dict]:
        before, forward, after = super()._sanitize_parameters(language, **others)
        return {"truncation": True, **before}, forward, after


class QuestionAnswering(Pipeline):
    """The task `question-answering`: the span of the context that answers the question best, or "" if none may.

    A context too long for a row is read in windows, with the settings of the fine-tuning (`config.finetuned`).
    """

    _load_tokenizer = True

    def _sanitize_parameters(self, language: str | None = None) -> tuple[dict, dict, dict]:
        return {}, {"language": language} if language else {}, {}

    def __call__(
        self, inputs: Any = None, question: str | None = None, context: str | None = None, **settings: Any
    ) -> Any:
        """inputs: {"question", "context"} or a list of these; or both as arguments. settings: `language`.

        Returns of each: "answer", its characters "start" to "end" of the context (both 0 for no answer), and "score", its share of the
        probability of all answers.
        """
        if inputs is None:
            inputs = {"question": question, "context": context}
        return super().__call__(inputs, **settings)

    def preprocess(self, inputs: dict[str, str]) -> dict[str, Any]:
        tokenizer, settings = self.tokenizer, self.model.config.finetuned
        question = tokenizer(inputs["question"], add_special_tokens=False)["input_ids"][: settings["max_question"]]
        ids, offsets = self._pieces(inputs["context"])
        if not ids:
            raise ValueError("the context is empty: give the text in which to look for the answer")
        start = [tokenizer.cls_token_id, *question, *[tokenizer.sep_token_id] * settings["separators"]]
        room = settings["max_length"] - len(start) - 1
        rows, firsts = [], [0]
        while firsts[-1] + room < len(ids):
            firsts.append(firsts[-1] + min(settings["stride"], room))
        for first in firsts:
            rows.append([*start, *ids[first : first + room], tokenizer.sep_token_id])
        padded = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        return {
            "input_ids": padded["input_ids"],
            "attention_mask": padded["attention_mask"],
            "context": inputs["context"],
            "offsets": offsets,
            "columns": [(len(start), len(row) - 1) for row in rows],  # the columns that the context has in each row
            "firsts": firsts,  # the number of the context's first piece in each row
        }

    def _pieces(self, context: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The context's pieces, and the characters that each stands for.

        With `by_word`, they are exact in words that normalising leaves as they are, and in others the whole word.
        """
        if not self.model.config.finetuned["by_word"]:
            whole = self.tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)
            spaces = [len(context[a:b]) - len(context[a:b].lstrip()) for a, b in whole["offset_mapping"]]
            return whole["input_ids"], [
                (min(a + skipped, b - 1), b) for (a, b), skipped in zip(whole["offset_mapping"], spaces, strict=True)
            ]
        normaliser = self.tokenizer.backend_tokenizer.normalizer
        words = list(re.finditer(r"\S+", context))
        encoded = self.tokenizer(
            [word.group() for word in words] or [""], add_special_tokens=False, return_offsets_mapping=True
        )
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for word, pieces, inside in zip(words, encoded["input_ids"], encoded["offset_mapping"], strict=False):
            exact = normaliser is None or normaliser.normalize_str(word.group()) == word.group()
            first = word.start()
            ids += pieces
            offsets += [(first + a, first + b) if exact else (first, word.end()) for a, b in inside]
        return ids, offsets

    def _forward(self, model_inputs: dict[str, Any], language: str | None = None) -> dict[str, Any]:
        tensors = {name: model_inputs.pop(name) for name in ("input_ids", "attention_mask")}
        outputs = self.model(**tensors, **({"language": language} if language else {}))
        return {**model_inputs, "start": outputs.start_logits, "end": outputs.end_logits}

    def postprocess(self, outputs: dict[str, Any]) -> dict[str, Any]:
        settings = self.model.config.finetuned
        none, totals = np.inf, []
        best = (-np.inf, 0, 0)  # score, first and last piece
        for row, (low, high) in enumerate(outputs["columns"]):
            start, end = (outputs[name][row].float().numpy() for name in ("start", "end"))
            none = min(none, start[0] + end[0])
            start, end, first = start[low:high], end[low:high], outputs["firsts"][row]
            for more in range(min(settings["max_answer"], len(start))):
                sums = start[: len(start) - more] + end[more:]
                totals.append(np.logaddexp.reduce(sums.astype(np.float64)))
                index = int(sums.argmax())
                if sums[index] > best[0]:
                    best = float(sums[index]), first + index, first + index + more
        silent = settings["no_answer"] and none > best[0]
        total = np.logaddexp.reduce([*totals, *([none] if settings["no_answer"] else [])])
        begin, finish = (0, 0) if silent else (outputs["offsets"][best[1]][0], outputs["offsets"][best[2]][1])
        score = float(np.exp((none if silent else best[0]) - total))
        return {"score": score, "start": begin, "end": finish, "answer": outputs["context"][begin:finish]}

"""Question answering: the answer is a span of the context, or none.

A row is `<s> question </s> context </s>`. A context too long for a row is read in windows that move on by `stride` pieces;
a question longer than `max_question` pieces loses its end. For a question without an answer the span to predict is `<s>`.
A question whose answer the file withholds (as the published dev files of TyDiQA-GoldP for XTREME do) is answered, and not
scored.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlinterf_ds.data.tokenizer import Tokenizer
from mlinterf_ds.files import write_text
from mlinterf_ds.tasks import metrics, spans
from mlinterf_ds.tasks.base import Kind, Limits, Row, Task
from mlinterf_ds.tasks.squad import Question, read_questions

FIRST_WORDS, MOST_WORDS, SAMPLE = 12, 12, 500  # the baseline's fixed spans: starts, lengths; questions it looks at


class Qa(Task):
    """Predictions are texts; the metric is SQuAD's F1."""

    name, metric = "qa", "f1"
    kind: Kind = "span"

    def read(self, path: Path, language: str) -> list[Question]:
        return read_questions(path, language, answered=not self.unlabelled)

    def synthetic(self, language: str, count: int, seed: int, split: str) -> list[Question]:
        from mlinterf_ds.data.synthetic import questions

        return [
            Question(f"{language}-{split}-{n}", q.question, q.context, ((q.answer, q.start),))
            for n, q in enumerate(questions(language, count, seed, split))
        ]

    def group(self, example: Question) -> str:
        return example.context

    def labelled(self, example: Question) -> bool:
        return not example.withheld

    def unfit(self, example: Question) -> tuple[str, str] | None:
        return (example.id, example.problem) if example.problem else None

    def labels(self, train: Sequence[Question]) -> list[str]:
        return ["start", "end", "none"] if any(q.impossible for q in train) else ["start", "end"]

    def rows(
        self, examples: Sequence[Question], tokenizer: Tokenizer, labels: Sequence[str], limits: Limits
    ) -> tuple[list[Row], list[str]]:
        rows: list[Row] = []
        cut = windowed = inexact = long = split = 0
        for index, example in enumerate(examples):
            question = tokenizer.encode(example.question)
            cut += len(question) > limits.max_question
            ids, offsets = tokenizer.locate(example.context)
            span = _gold_span(example, offsets)
            windows = list(
                spans.windows(index, question[: limits.max_question], ids, offsets, span, limits, tokenizer.vocabulary)
            )
            windowed += len(windows) > 1
            if span:
                covered = example.context[offsets[span[0]][0] : offsets[span[1]][1]]
                inexact += not metrics.exact_match(covered, example.texts)
                long += span[1] - span[0] >= limits.max_answer
                split += not any(row.targets[0] for row in windows)
            rows += windows
        counts = {
            f"cut to {limits.max_question} pieces": cut,
            f"with contexts longer than a row, read in windows of stride {limits.stride}": windowed,
            "with answers that start or end inside a piece, which no prediction can match": inexact,
            f"with answers longer than {limits.max_answer} pieces, which no prediction can cover": long,
            "with answers that no window holds as a whole, which training does not see": split,
            "with answers found by other white space, Unicode composition or position": sum(q.moved for q in examples),
            "with further answers that their contexts do not hold": sum(q.lost > 0 and not q.problem for q in examples),
        }
        parts = [f"{count} {text}" for text, count in counts.items() if count]
        return rows, [f"of {len(examples)} questions: {'; '.join(parts)}"] if parts else []

    def predict(
        self, examples: Sequence[Question], rows: list[Row], outputs: list[Any], labels: list[str], limits: Limits
    ) -> list[str]:
        best: list[tuple[float, str]] = [(-np.inf, "")] * len(examples)
        none = np.full(len(examples), np.inf)  # score of "no answer": the lowest of an example's windows
        for row, (start, end) in zip(rows, outputs, strict=True):
            none[row.example] = min(none[row.example], start[0] + end[0])
            score, first, last = spans.best_span(start[1:], end[1:], limits.max_answer)
            if score > best[row.example][0]:
                low, high = row.detail[first][0], row.detail[last][1]
                best[row.example] = score, examples[row.example].context[low:high]
        nullable = "none" in labels
        return ["" if nullable and null > score else text for (score, text), null in zip(best, none, strict=True)]

    def score(self, examples: Sequence[Question], predictions: Sequence[str]) -> dict[str, float]:
        pairs = [(text, q.texts) for q, text in zip(examples, predictions, strict=True) if not q.withheld]
        scorers = {"f1": metrics.answer_f1, "em": metrics.exact_match} if pairs else {}
        return {name: 100 * sum(score(*pair) for pair in pairs) / len(pairs) for name, score in scorers.items()}

    def counts(self, examples: Sequence[Question], predictions: Sequence[str]) -> list[metrics.Counts]:
        pairs = zip(examples, predictions, strict=True)
        return [(metrics.answer_f1(text, q.texts), 1.0, 1.0) for q, text in pairs if not q.withheld]

    def baselines(self, train: Sequence[Question], test: Sequence[Question]) -> dict[str, dict[str, float]]:
        """majority: the same word positions in every context (or no answer), chosen as the best on 500 questions of `train`."""
        sample = [q for q in train if not q.withheld][:SAMPLE]
        words = [q.context.split() for q in sample]
        candidates = [(0, 0)] + [(i, i + n) for i in range(FIRST_WORDS) for n in range(1, MOST_WORDS + 1)]

        def on_train(span: tuple[int, int]) -> float:
            pairs = zip(sample, words, strict=True)
            return sum(metrics.answer_f1(" ".join(context[slice(*span)]), q.texts) for q, context in pairs)

        best = slice(*max(candidates, key=on_train))
        return {"majority": self.score(test, [" ".join(q.context.split()[best]) for q in test])}

    def write(self, examples: Sequence[Question], predictions: Sequence[str], path: Path) -> None:
        """Writes {id: answer} as JSON, which SQuAD's scorer reads."""
        answers = {q.id: text for q, text in zip(examples, predictions, strict=True)}
        write_text(path, json.dumps(answers, ensure_ascii=False, indent=1) + "\n")

    def suffix(self, examples: Sequence[Question]) -> str:
        return ".json"

    def report(self, examples: Sequence[Question], predictions: Sequence[str]) -> str:
        """Scores by the length of the (first) answer in words."""
        groups: dict[str, list[tuple[float, float]]] = {}
        for q, text in zip(examples, predictions, strict=True):
            if not q.withheld:
                length = len(q.texts[0].split())
                name = "none" if not length else "1" if length == 1 else "2-3" if length < 4 else "4 or more"
                scores = metrics.exact_match(text, q.texts), metrics.answer_f1(text, q.texts)
                groups.setdefault(name, []).append(scores)
        lines = ["| words in the answer | EM | F1 | questions |", "|---|---|---|---|"]
        for name, group in sorted(groups.items()):
            em, f1 = (100 * float(value) for value in np.mean(group, axis=0))
            lines.append(f"| {name} | {em:.1f} | {f1:.1f} | {len(group)} |")
        return "\n".join(lines) + "\n"


def _gold_span(example: Question, offsets: spans.Offsets) -> tuple[int, int] | None:
    """(first, last) piece of the first answer that is not empty; None if there is no answer to predict."""
    answer = next((answer for answer in example.answers if answer[0]), None)
    return spans.cover(offsets, answer) if answer and not example.impossible else None

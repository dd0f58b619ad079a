"""Question answering: SQuAD-format JSON (TyDiQA-GoldP, XQuAD, MLQA, SQuAD 1 and 2), answers as spans of the context.

A row is `<s> question </s> context </s>`. A context too long for it is read in windows that move on by `stride` pieces; a
question longer than `max_question` pieces loses its end. `is_impossible` names a question without an answer: then `<s>`
is the span to predict. A question all of whose answers are empty strings has its answer withheld (as in the published
dev files of TyDiQA-GoldP for XTREME): it is answered, and not scored.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlinterf_ds.data.text import normalise
from mlinterf_ds.data.tokenizer import BOS, EOS, UNK, Tokenizer
from mlinterf_ds.errors import UserError, refusing
from mlinterf_ds.files import write_text
from mlinterf_ds.tasks import metrics
from mlinterf_ds.tasks.base import Kind, Limits, Row
from mlinterf_ds.tasks.files import bad, read_text, typed

FIRST_WORDS, MOST_WORDS, SAMPLE = 12, 12, 500  # fixed spans tried as a baseline: where they start, how long they are
FEWEST_PIECES = 8  # of context in a window
PARAGRAPH = "; expected {context: text, qas: [...]}"
QUESTION = "; expected {id, question, answers: [{text, answer_start}]}"
TYDIQA = {
    "ar": "arabic", "bn": "bengali", "en": "english", "fi": "finnish", "id": "indonesian", "ja": "japanese",
    "ko": "korean", "ru": "russian", "sw": "swahili", "te": "telugu", "th": "thai",
}  # fmt: skip

Offsets = list[tuple[int, int]]  # of each piece in the context, in characters


@dataclass(frozen=True)
class Question:
    """A question on a context, under an id that is made unique by `#2`, ...; `context[start : start + len(text)] == text` for every (text, start) of `answers`."""

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]
    impossible: bool = False  # `is_impossible`: the right answer is none

    @property
    def hidden(self) -> bool:
        """Whether the file withholds the answer."""
        return not self.impossible and not any(text for text, _ in self.answers)

    @property
    def texts(self) -> list[str]:
        """Every right answer."""
        return [""] if self.impossible else [text for text, _ in self.answers]


class Qa:
    """Predictions are texts; the metric is SQuAD's F1."""

    name, metric = "qa", "f1"
    kind: Kind = "span"

    def read(self, path: Path, language: str) -> list[Question]:
        text = read_text(path)
        form = "; expected data[].paragraphs[].{context, qas[].{id, question, answers[].{text, answer_start}}}"
        with refusing(f"{path}: not in SQuAD's format", form):
            try:
                tree = json.loads(text)
            except json.JSONDecodeError as error:
                raise bad(path, error.lineno, f"not JSON: {error.msg}") from None
            found = list(_questions(path, text, tree))
        if not found:
            raise UserError(f"{path}: no questions in it")
        return _of_language(path, found, language)

    def synthetic(self, language: str, count: int, seed: int, split: str) -> list[Question]:
        from mlinterf_ds.data.synthetic import questions

        return [
            Question(f"{language}-{split}-{n}", q.question, q.context, ((q.answer, q.start),))
            for n, q in enumerate(questions(language, count, seed, split))
        ]

    def group(self, example: Question) -> str:
        return example.context

    def labelled(self, example: Question) -> bool:
        return not example.hidden

    def labels(self, train: Sequence[Question]) -> list[str]:
        return ["start", "end", "none"] if any(q.impossible for q in train) else ["start", "end"]

    def rows(
        self, examples: Sequence[Question], tokenizer: Tokenizer, labels: Sequence[str], limits: Limits
    ) -> tuple[list[Row], list[str]]:
        pieces = tokenizer.pieces
        found: list[Row] = []
        cut = missed = windowed = long = split = 0
        for index, example in enumerate(examples):
            question = tokenizer.encode(example.question)
            cut += len(question) > limits.max_question
            question = question[: limits.max_question]
            ids, offsets = located(example.context, tokenizer, pieces)
            answer = next((found for found in example.answers if found[0]), None)
            span = _cover(offsets, answer) if answer else None
            if span and not example.impossible:
                nearest = example.context[offsets[span[0]][0] : offsets[span[1]][1]]
                missed += not metrics.exact_match(nearest, example.texts)
            before = len(found)
            found += _windows(index, question, ids, offsets, None if example.impossible else span, limits)
            windowed += len(found) - before > 1
            if span and not example.impossible:
                long += span[1] - span[0] >= limits.max_answer
                split += not any(row.targets[0] for row in found[before:])
        notes = []
        if cut:
            notes.append(f"{cut} questions were cut to {limits.max_question} pieces")
        if windowed:
            notes.append(f"{windowed} contexts are longer than a row and are read in windows of stride {limits.stride}")
        if missed:
            notes.append(
                f"{missed} of {len(examples)} gold answers start or end inside a piece: no prediction can match them"
            )
        if long:
            notes.append(
                f"{long} gold answers are longer than {limits.max_answer} pieces: they are not predicted whole"
            )
        if split:
            notes.append(f"{split} gold answers are whole in no window: no window is trained to find them")
        return found, notes

    def predict(
        self,
        examples: Sequence[Question],
        rows: Sequence[Row],
        outputs: Sequence[Any],
        labels: Sequence[str],
        limits: Limits,
    ) -> list[str]:
        best: list[tuple[float, str]] = [(-np.inf, "")] * len(examples)
        none = np.full(len(examples), np.inf)
        for row, (start, end) in zip(rows, outputs, strict=True):
            none[row.example] = min(none[row.example], start[0] + end[0])
            score, first, last = _best_span(start[1:], end[1:], limits.max_answer)
            if score > best[row.example][0]:
                low, high = row.detail[first][0], row.detail[last][1]
                best[row.example] = score, examples[row.example].context[low:high]
        nullable = "none" in labels
        return ["" if nullable and null > score else text for (score, text), null in zip(best, none, strict=True)]

    def score(self, examples: Sequence[Question], predictions: Sequence[str]) -> dict[str, float]:
        pairs = [(q.texts, text) for q, text in zip(examples, predictions, strict=True) if not q.hidden]
        if not pairs:
            return {}
        return {
            "f1": 100 * sum(metrics.answer_f1(text, answers) for answers, text in pairs) / len(pairs),
            "em": 100 * sum(metrics.exact_match(text, answers) for answers, text in pairs) / len(pairs),
        }

    def counts(self, examples: Sequence[Question], predictions: Sequence[str]) -> list[metrics.Counts]:
        pairs = zip(examples, predictions, strict=True)
        return [(metrics.answer_f1(text, q.texts), 1.0, 1.0) for q, text in pairs if not q.hidden]

    def baselines(self, train: Sequence[Question], test: Sequence[Question]) -> dict[str, dict[str, float]]:
        """majority: the same words of every context (or no answer), whichever do best on (500 questions of) `train`."""
        sample = [q for q in train if not q.hidden][:SAMPLE]
        words = [q.context.split() for q in sample]
        candidates = [(0, 0)] + [(i, i + n) for i in range(FIRST_WORDS) for n in range(1, MOST_WORDS + 1)]

        def on_train(span: tuple[int, int]) -> float:
            return sum(
                metrics.answer_f1(" ".join(w[slice(*span)]), q.texts) for q, w in zip(sample, words, strict=True)
            )

        best = slice(*max(candidates, key=on_train))
        return {"majority": self.score(test, [" ".join(q.context.split()[best]) for q in test])}

    def write(self, examples: Sequence[Question], predictions: Sequence[str], path: Path) -> None:
        """{id: answer}, which SQuAD's scorer reads."""
        answers = {q.id: text for q, text in zip(examples, predictions, strict=True)}
        write_text(path, json.dumps(answers, ensure_ascii=False, indent=1) + "\n")

    def suffix(self, examples: Sequence[Question]) -> str:
        return ".json"

    def report(self, examples: Sequence[Question], predictions: Sequence[str]) -> str:
        """Scores by the length of the (first) answer in words."""
        groups: dict[str, list[tuple[float, float]]] = {}
        for q, text in zip(examples, predictions, strict=True):
            if not q.hidden:
                length = len(q.texts[0].split())
                name = "none" if not length else "1" if length == 1 else "2-3" if length < 4 else "4 or more"
                found = metrics.exact_match(text, q.texts), metrics.answer_f1(text, q.texts)
                groups.setdefault(name, []).append(found)
        lines = ["| words in the answer | EM | F1 | questions |", "|---|---|---|---|"]
        for name, scores in sorted(groups.items()):
            em, f1 = (100 * float(value) for value in np.mean(scores, axis=0))
            lines.append(f"| {name} | {em:.1f} | {f1:.1f} | {len(scores)} |")
        return "\n".join(lines) + "\n"


# --- the file --------------------------------------------------------------------------------------------------------
def _questions(path: Path, text: str, tree: dict[str, Any]) -> Iterator[Question]:
    """Every question, in order. A mistake is placed by its path in the tree, and by its line where its id says it."""
    seen: Counter[str] = Counter()
    at, line = 0, 1  # where the last question's id stands: ids may repeat
    for a, article in enumerate(tree["data"]):
        for p, paragraph in enumerate(article["paragraphs"]):
            with refusing(f"{path}: data[{a}].paragraphs[{p}]", PARAGRAPH):
                context, asked = typed(paragraph["context"], str, "context"), typed(paragraph["qas"], list, "qas")
            for q, qa in enumerate(asked):
                place = f"data[{a}].paragraphs[{p}].qas[{q}]"
                with refusing(f"{path}: {place}", QUESTION):
                    spelt = {json.dumps(qa["id"]), json.dumps(qa["id"], ensure_ascii=False)}
                    name = typed(str(qa["id"]) if type(qa["id"]) is int else qa["id"], str, "id")
                hit = re.compile(f'"id"\\s*:\\s*(?:{"|".join(map(re.escape, spelt))})').search(text, at)
                if hit:
                    at, line = hit.end(), line + text.count("\n", at, hit.end())
                with refusing(f"{path}, line {line}: {place}, id {name!r}", QUESTION):
                    question = typed(qa["question"], str, "question")
                    answers = tuple(
                        (typed(a["text"], str, "text"), typed(a["answer_start"], int, "answer_start"))
                        for a in typed(qa["answers"], list, "answers")
                    )
                    impossible = typed(qa.get("is_impossible", False), bool, "is_impossible")
                if problem := _problem(context, answers, impossible):
                    raise bad(path, line, f"question {name!r}: {problem}")
                seen[name] += 1
                if seen[name] > 1:  # TyDiQA-GoldP for XTREME numbers its English questions again and again
                    name += f"#{seen[name]}"
                yield Question(name, question, context, () if impossible else answers, impossible)


def _of_language(path: Path, found: list[Question], language: str) -> list[Question]:
    """TyDiQA-GoldP has all languages in one file, named in the ids (`finnish-...`): those of this one."""
    named = [question.id.partition("-")[0] for question in found]
    if not set(named) <= set(TYDIQA.values()) or len(set(named)) == 1:
        return found
    kept = [question for question, name in zip(found, named, strict=True) if name == TYDIQA.get(language)]
    if not kept:
        raise UserError(f"{path}: no questions in language {language!r}; its ids name {', '.join(sorted(set(named)))}")
    return kept


def _problem(context: str, answers: Sequence[tuple[str, int]], impossible: bool) -> str:
    if not context.strip():
        return "its context is empty"
    if not answers and not impossible:
        return 'no answers; say "is_impossible": true if it has none'
    for answer, start in answers if not impossible else ():
        found = context[start : start + len(answer)]
        if start < 0 or found != answer:
            where = context.find(answer)
            hint = f"the text first occurs at {where}" if where >= 0 else "the text does not occur in the context"
            return f"answer {answer!r} is not at answer_start {start}, where {found!r} stands ({hint})"
    return ""


# --- pieces and where they are -----------------------------------------------------------------------------------------
def located(context: str, tokenizer: Tokenizer, pieces: Sequence[str]) -> tuple[list[int], Offsets]:
    """The context's pieces, and which characters of the context each stands for.

    Exact where normalising leaves a word as it is; else every piece of that word stands for the whole word.
    """
    ids: list[int] = []
    offsets: Offsets = []
    for match in re.finditer(r"\S+", context):
        word, start = match.group(), match.start()
        found = tokenizer.encode(word)
        if normalise(word) == word:
            places = [(start + low, start + high) for low, high in _inside(word, found, pieces)]
        else:
            places = [(start, match.end())] * len(found)
        ids += found
        offsets += places
    return ids, offsets


def _inside(word: str, ids: Sequence[int], pieces: Sequence[str]) -> Offsets:
    """Where the pieces of a word lie in it. `<unk>` stands for characters that no piece has, up to the next piece."""
    places: Offsets = []
    at = 0
    texts = [None if i == UNK else pieces[i].removeprefix("\u2581") for i in ids]
    for index, text in enumerate(texts):
        if text is None:
            following = next((t for t in texts[index + 1 :] if t), None)
            end = word.find(following, at + 1) if following else len(word)
        else:
            end = at + len(text)
        places.append((at, end))
        at = end
    assert at == len(word), f"{word!r}: pieces {texts} do not spell it"
    return places


def _cover(offsets: Offsets, answer: tuple[str, int]) -> tuple[int, int] | None:
    """(first, last) piece of the smallest run that covers the answer; None if it has no piece."""
    text, start = answer
    inside = [k for k, (low, high) in enumerate(offsets) if high > start and low < start + len(text)]
    return (inside[0], inside[-1]) if inside else None


def _windows(
    example: int, question: list[int], ids: list[int], offsets: Offsets, span: tuple[int, int] | None, limits: Limits
) -> Iterator[Row]:
    room = limits.max_length - len(question) - 3
    if room < FEWEST_PIECES:
        raise UserError(
            f"finetune.max_length={limits.max_length} leaves {room} pieces of context beside a question of "
            f"{len(question)}: lower finetune.max_question or raise finetune.max_length"
        )
    first = 0
    while True:
        end = min(first + room, len(ids))
        tokens = [BOS, *question, EOS, *ids[first:end], EOS]
        shift = len(question) + 2 - first
        positions = [0, *range(first + shift, end + shift)]
        targets = [0, 0]
        if span and first <= span[0] and span[1] < end:
            targets = [span[0] - first + 1, span[1] - first + 1]
        yield Row(example, tokens, positions, targets, offsets[first:end])
        if end == len(ids):
            return
        first += min(limits.stride, room)


def _best_span(start: np.ndarray, end: np.ndarray, most: int) -> tuple[float, int, int]:
    """(score, first, last) of the best span of at most `most` pieces."""
    best = (-np.inf, 0, 0)
    for longer in range(min(most, len(start))):
        sums = start[: len(start) - longer] + end[longer:]
        first = int(sums.argmax())
        if sums[first] > best[0]:
            best = (float(sums[first]), first, first + longer)
    return best

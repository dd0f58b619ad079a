"""SQuAD's JSON format, in which TyDiQA-GoldP, XQuAD, MLQA and SQuAD 1 and 2 are published."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlinterf_ds.errors import UserError, refusing
from mlinterf_ds.tasks.files import bad, read_text, typed

FILE = "; expected data[].paragraphs[].{context, qas[].{id, question, answers[].{text, answer_start}}}"
PARAGRAPH = "; expected {context: text, qas: [...]}"
QUESTION = "; expected {id, question, answers: [{text, answer_start}]}"
TYDIQA = {
    "ar": "arabic", "bn": "bengali", "en": "english", "fi": "finnish", "id": "indonesian", "ja": "japanese",
    "ko": "korean", "ru": "russian", "sw": "swahili", "te": "telugu", "th": "thai",
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A question on a context. For every (text, start) of `answers`, `context[start : start + len(text)] == text`."""

    id: str  # unique in its file: the second question of an id ends in `#2`
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]
    impossible: bool = False  # the file says `is_impossible`: "no answer" is the right answer

    @property
    def withheld(self) -> bool:
        """Whether the file withholds the answer: all of its answers are empty strings."""
        return not self.impossible and not any(text for text, _ in self.answers)

    @property
    def texts(self) -> list[str]:
        """Every right answer."""
        return [""] if self.impossible else [text for text, _ in self.answers]


def read_questions(path: Path, language: str) -> list[Question]:
    """The questions of a file. Of a file with all of TyDiQA's languages, only those in `language`.

    UserError names the file, the line and the path in the JSON tree of a mistake.
    """
    text = read_text(path)
    with refusing(f"{path}: not in SQuAD's format", FILE):
        try:
            tree = json.loads(text)
        except json.JSONDecodeError as error:
            raise bad(path, error.lineno, f"not JSON: {error.msg}") from None
        questions = list(_questions(path, text, tree))
    if not questions:
        raise UserError(f"{path}: the file holds no questions")
    return _of_language(path, questions, language)


def _questions(path: Path, text: str, tree: dict[str, Any]) -> Iterator[Question]:
    """Every question, in order. The line of a question, for messages, is that of its id in the text."""
    times: Counter[str] = Counter()
    position, line = 0, 1  # just after the last question's id in the text: ids may repeat
    for a, article in enumerate(tree["data"]):
        for p, paragraph in enumerate(article["paragraphs"]):
            with refusing(f"{path}: data[{a}].paragraphs[{p}]", PARAGRAPH):
                context, asked = typed(paragraph["context"], str, "context"), typed(paragraph["qas"], list, "qas")
            for q, fields in enumerate(asked):
                key = f"data[{a}].paragraphs[{p}].qas[{q}]"
                with refusing(f"{path}: {key}", QUESTION):
                    spellings = {json.dumps(fields["id"]), json.dumps(fields["id"], ensure_ascii=False)}
                    name = typed(str(fields["id"]) if type(fields["id"]) is int else fields["id"], str, "id")
                match = re.compile(f'"id"\\s*:\\s*(?:{"|".join(map(re.escape, spellings))})').search(text, position)
                if match:
                    line += text.count("\n", position, match.end())
                    position = match.end()
                with refusing(f"{path}, line {line}: {key}, id {name!r}", QUESTION):
                    question = _question(name, context, fields)
                if problem := _problem(question):
                    raise bad(path, line, f"question {name!r}: {problem}")
                times[name] += 1
                unique = f"{name}#{times[name]}" if times[name] > 1 else name  # XTREME's English TyDiQA repeats ids
                answers = () if question.impossible else question.answers
                yield Question(unique, question.question, context, answers, question.impossible)


def _question(name: str, context: str, fields: dict[str, Any]) -> Question:
    question = typed(fields["question"], str, "question")
    answers = tuple(
        (typed(answer["text"], str, "text"), typed(answer["answer_start"], int, "answer_start"))
        for answer in typed(fields["answers"], list, "answers")
    )
    return Question(name, question, context, answers, typed(fields.get("is_impossible", False), bool, "is_impossible"))


def _problem(question: Question) -> str:
    """Why the question cannot be used, or ''."""
    context = question.context
    if not context.strip():
        return "its context is empty"
    if question.impossible:
        return ""
    if not question.answers:
        return 'it has no answers; write "is_impossible": true if that is meant'
    for answer, start in question.answers:
        text = context[start : start + len(answer)]
        if start < 0 or text != answer:
            first = context.find(answer)
            hint = f"the text first occurs at {first}" if first >= 0 else "the text does not occur in the context"
            return f"answer {answer!r} is not at answer_start {start}, where the context has {text!r} ({hint})"
    return ""


def _of_language(path: Path, questions: list[Question], language: str) -> list[Question]:
    """TyDiQA-GoldP has all languages in one file and names them in the ids (`finnish-...`); keeps one language's."""
    names = [question.id.partition("-")[0] for question in questions]
    if not set(names) <= set(TYDIQA.values()) or len(set(names)) == 1:
        return questions
    kept = [question for question, name in zip(questions, names, strict=True) if name == TYDIQA.get(language)]
    if not kept:
        raise UserError(f"{path}: no questions in language {language!r}; its ids name {', '.join(sorted(set(names)))}")
    return kept

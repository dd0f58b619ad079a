"""SQuAD's JSON format, in which TyDiQA-GoldP, XQuAD, MLQA and SQuAD 1 and 2 are published."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from mlinterf_ds.data.tokenizer import INVISIBLE, normalise
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
    problem: str = ""  # why the question, or every one of its answers, cannot be used
    moved: bool = False  # an answer is not at its place letter by letter, and was found as the model reads it
    lost: int = 0  # answers that were not found, beside others that were

    @property
    def withheld(self) -> bool:
        """Whether there is no answer to score: the file has only empty ones, or none that can be used."""
        return not self.impossible and not any(text for text, _ in self.answers)

    @property
    def texts(self) -> list[str]:
        """Every right answer."""
        return [""] if self.impossible else [text for text, _ in self.answers]


def read_questions(path: Path, language: str, answered: bool = True) -> list[Question]:
    """The questions of a file. Of a file with all of TyDiQA's languages, only those in `language`.

    answered: False for new text, whose answers, if it has any, are not read. Raises UserError that names the file, the line
    and the path in the JSON tree of a mistake.
    """
    text = read_text(path)
    with refusing(f"{path}: not in SQuAD's format", FILE):
        try:
            tree = json.loads(text)
        except json.JSONDecodeError as error:
            raise bad(path, error.lineno, f"not JSON: {error.msg}") from None
        questions = list(_questions(path, text, tree, answered))
    if not questions:
        raise UserError(f"{path}: the file holds no questions")
    return _of_language(path, questions, language)


def _questions(path: Path, text: str, tree: dict[str, Any], answered: bool) -> Iterator[Question]:
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
                    times[name] += 1
                    unique = f"{name}#{times[name]}" if times[name] > 1 else name  # XTREME's English TyDiQA repeats ids
                    asked = typed(fields["question"], str, "question")
                    impossible = answered and typed(fields.get("is_impossible", False), bool, "is_impossible")
                    answers = [
                        (typed(answer["text"], str, "text"), typed(answer["answer_start"], int, "answer_start"))
                        for answer in (typed(fields["answers"], list, "answers") if answered else [])
                    ]
                if not normalise(context):
                    raise bad(path, line, f"question {name!r}: its context is empty")
                if answered and not impossible and not answers:
                    message = 'it has no answers; write "is_impossible": true if that is meant'
                    raise bad(path, line, f"question {name!r}: {message}")
                yield _located(Question(unique, asked, context, () if impossible else tuple(answers), impossible))


def _located(question: Question) -> Question:
    """The question with its answers as the context spells them, without those that are not found there."""
    if not normalise(question.question):
        return replace(question, answers=(), impossible=False, problem="its question has no visible character")
    usable, problems, moved = [], [], False
    for answer, start in question.answers:
        if answer and not normalise(answer):
            problems.append(f"answer {answer!r} has no visible character")
        elif start >= 0 and question.context[start : start + len(answer)] == answer:
            usable.append((answer, start))
        elif located := locate(question.context, answer, start):
            usable.append(located)
            moved = True
        else:
            count = question.context.count(answer)
            where = f"occurs {count} times elsewhere in the context" if count else "does not occur in the context"
            problems.append(f"answer {answer!r} is not at answer_start {start} and {where}")
    if not problems and not moved:
        return question
    if not any(text for text, _ in usable):
        return replace(question, answers=(), problem=problems[0])
    return replace(question, answers=tuple(usable), moved=moved, lost=len(problems))


def locate(context: str, answer: str, start: int) -> tuple[str, int] | None:
    """The (text, start) of an answer that the context spells with other white space or Unicode composition, or elsewhere.

    None if it does not occur, or several times and never at `start`, counted in the context as it is or as models read it.
    """
    text, offsets = _as_read(context)
    wanted = _as_read(answer)[0].strip()
    firsts = [
        match.start()
        for match in re.finditer(f"(?={re.escape(wanted)})", text)
        if not unicodedata.combining(text[match.start() + len(wanted) :][:1] or " ")  # it ends inside no letter
    ]
    right = firsts if len(firsts) == 1 else [first for first in firsts if start in (first, offsets[first])]
    if not right:
        return None
    low, high = offsets[right[0]], offsets[right[0] + len(wanted) - 1] + 1
    return context[low:high], low


@lru_cache(maxsize=8)
def _as_read(text: str) -> tuple[str, list[int]]:
    """A text as models read it, but decomposed (NFD), and the index in `text` of each of its characters."""
    letters: list[str] = []
    offsets: list[int] = []
    for index, letter in enumerate(text):
        if letter.isspace():
            letter = "" if letters[-1:] == [" "] else " "
        for part in unicodedata.normalize("NFD", INVISIBLE.sub("", letter)):
            letters.append(part)
            offsets.append(index)
    return "".join(letters), offsets


def _of_language(path: Path, questions: list[Question], language: str) -> list[Question]:
    """TyDiQA-GoldP has all languages in one file and names them in the ids (`finnish-...`); keeps one language's."""
    names = [question.id.partition("-")[0] for question in questions]
    if not set(names) <= set(TYDIQA.values()) or len(set(names)) == 1:
        return questions
    kept = [question for question, name in zip(questions, names, strict=True) if name == TYDIQA.get(language)]
    if not kept:
        raise UserError(f"{path}: no questions in language {language!r}; its ids name {', '.join(sorted(set(names)))}")
    return kept

"""From a meaning to a sentence of a synthetic language, with its gold annotation."""

from functools import cache
from typing import NamedTuple

from mlinterf_ds.data.synthetic.grammar import (
    ABLE,
    CAN,
    CONCEPTS,
    FUTURE,
    NEGATION,
    PAST,
    PRESENT,
    STOPS,
    SUFFIXES,
    WILL,
    Clause,
    Meaning,
    Phrase,
)
from mlinterf_ds.data.synthetic.language import SyntheticLanguage, lexicon

PLURAL_SUFFIX, PAST_SUFFIX, AGREEMENT_SUFFIX, OBJECT_CASE, ADPOSITION_CASE = SUFFIXES


class Token(NamedTuple):
    """A word with its gold labels; suffixes are part of the word."""

    form: str
    pos: str  # UPOS
    entity: str  # IOB2
    role: str  # subject, object or complement for the words of that phrase (its adposition apart), else empty
    concept: int


class Grammar:
    """Turns meanings into sentences of one language."""

    def __init__(self, spoken: SyntheticLanguage) -> None:
        self.spoken = spoken
        self.forms = lexicon(spoken)

    def tokens(self, meaning: Meaning) -> list[Token]:
        """Returns the sentence's words, its final full stop or question mark included."""
        out: list[Token] = []
        for number, clause in enumerate(meaning.clauses):
            if number:
                assert meaning.link is not None
                self._word(out, meaning.link)
            self._clause(out, clause)
        self._word(out, STOPS[meaning.question])
        return out

    def text(self, meaning: Meaning) -> str:
        return " ".join([token.form for token in self.tokens(meaning)])

    def _clause(self, out: list[Token], clause: Clause) -> None:
        """Adds subject, verb, adverb, object, adjunct; if the language is verb-final, subject, object, adjunct, adverb, verb."""
        self._phrase(out, clause.subject, "subject")
        if self.spoken.verb_final:
            self._object(out, clause)
            self._adjunct(out, clause)
            self._word(out, clause.adverb)
            self._verb(out, clause)
        else:
            self._verb(out, clause)
            self._word(out, clause.adverb)
            self._object(out, clause)
            self._adjunct(out, clause)

    def _verb(self, out: list[Token], clause: Clause) -> None:
        """Adds auxiliary, negation, verb; verb-final languages reverse them. Tense and agreement are suffixes."""
        auxiliary = {FUTURE: WILL, ABLE: CAN}.get(clause.tense)
        negation = NEGATION[0] if clause.negative else None
        suffix = ""
        if clause.tense == PAST:
            suffix = self.forms[PAST_SUFFIX]
        elif clause.tense == PRESENT and clause.subject.plural:
            suffix = self.forms[AGREEMENT_SUFFIX]
        if self.spoken.verb_final:
            self._word(out, clause.verb, suffix)
            self._word(out, negation)
            self._word(out, auxiliary)
        else:
            self._word(out, auxiliary)
            self._word(out, negation)
            self._word(out, clause.verb, suffix)

    def _object(self, out: list[Token], clause: Clause) -> None:
        if clause.object is not None:
            self._phrase(out, clause.object, "object", OBJECT_CASE)

    def _adjunct(self, out: list[Token], clause: Clause) -> None:
        if clause.complement is not None:
            if not self.spoken.postpositions:
                self._word(out, clause.adposition)
            self._phrase(out, clause.complement, "complement", ADPOSITION_CASE)
            if self.spoken.postpositions:
                self._word(out, clause.adposition)

    def _phrase(self, out: list[Token], phrase: Phrase, role: str, case: int | None = None) -> None:
        """Adds determiner, adjective, noun (or noun, adjective). The noun, or a name's last word, carries number and case."""
        ending = self.forms[case] if case is not None and self.spoken.cases else ""
        self._word(out, phrase.determiner, role=role)
        if not self.spoken.adjective_after:
            self._word(out, phrase.adjective, role=role)
        if phrase.entity:
            last = len(phrase.words) - 1
            for n, word in enumerate(phrase.words):
                self._word(out, word, ending if n == last else "", role, ("I-" if n else "B-") + phrase.entity)
        else:
            self._word(out, phrase.words[0], self.forms[PLURAL_SUFFIX] + ending if phrase.plural else ending, role)
        if self.spoken.adjective_after:
            self._word(out, phrase.adjective, role=role)

    def _word(self, out: list[Token], concept: int | None, suffix: str = "", role: str = "", entity: str = "O") -> None:
        if concept is not None:
            out.append(Token(self.forms[concept] + suffix, CONCEPTS[concept], entity, role, concept))


@cache
def grammar(spoken: SyntheticLanguage) -> Grammar:
    """Returns the language's grammar, which is built once."""
    return Grammar(spoken)

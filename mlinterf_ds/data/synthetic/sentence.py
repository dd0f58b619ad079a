"""From a meaning to a sentence of a synthetic language, with its gold annotation."""

from itertools import chain
from typing import NamedTuple

from mlinterf_ds.data.synthetic import meanings
from mlinterf_ds.data.synthetic.language import SyntheticLanguage, lexicon
from mlinterf_ds.data.synthetic.meanings import Clause, Meaning, Phrase

PLURAL_SUFFIX, PAST_SUFFIX, AGREEMENT_SUFFIX, OBJECT_CASE, ADPOSITION_CASE = meanings.SUFFIXES


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
        first, *second = [self._clause(clause) for clause in meaning.clauses]
        return [*first, *self._word(meaning.link), *chain(*second), *self._word(meanings.STOPS[meaning.question])]

    def text(self, meaning: Meaning) -> str:
        return " ".join([token.form for token in self.tokens(meaning)])

    def _clause(self, clause: Clause) -> list[Token]:
        """Returns subject, verb, adverb, object, adjunct; in a verb-final language subject, object, adjunct, adverb, verb."""
        subject = self._phrase(clause.subject, "subject")
        objects = self._phrase(clause.object, "object", OBJECT_CASE)
        adposition = self._word(clause.adposition)
        complement = self._phrase(clause.complement, "complement", ADPOSITION_CASE)
        adjunct = complement + adposition if self.spoken.postpositions else adposition + complement
        adverb, verb = self._word(clause.adverb), self._verb(clause)
        if self.spoken.verb_final:
            return subject + objects + adjunct + adverb + verb
        return subject + verb + adverb + objects + adjunct

    def _verb(self, clause: Clause) -> list[Token]:
        """Returns auxiliary, negation, verb; verb-final languages reverse them. Tense and agreement are suffixes."""
        auxiliary = self._word({meanings.FUTURE: meanings.WILL, meanings.ABLE: meanings.CAN}.get(clause.tense))
        negation = self._word(meanings.NEGATION[0] if clause.negative else None)
        suffix = ""
        if clause.tense == meanings.PAST:
            suffix = self.forms[PAST_SUFFIX]
        elif clause.tense == meanings.PRESENT and clause.subject.plural:
            suffix = self.forms[AGREEMENT_SUFFIX]
        verb = self._word(clause.verb, suffix)
        return verb + negation + auxiliary if self.spoken.verb_final else auxiliary + negation + verb

    def _phrase(self, phrase: Phrase | None, role: str, case: int | None = None) -> list[Token]:
        """Returns determiner, adjective, noun (or noun, adjective). The noun, or a name's last word, carries number and case."""
        if phrase is None:
            return []
        ending = self.forms[case] if case is not None and self.spoken.cases else ""
        if phrase.plural:
            ending = self.forms[PLURAL_SUFFIX] + ending
        head: list[Token] = []
        for word in phrase.words:
            entity = ("I-" if head else "B-") + phrase.entity if phrase.entity else "O"
            head += self._word(word, ending if len(head) + 1 == len(phrase.words) else "", role, entity)
        determiner, adjective = self._word(phrase.determiner, role=role), self._word(phrase.adjective, role=role)
        return determiner + (head + adjective if self.spoken.adjective_after else adjective + head)

    def _word(self, concept: int | None, suffix: str = "", role: str = "", entity: str = "O") -> list[Token]:
        """Returns the concept's word, or nothing for None."""
        if concept is None:
            return []
        return [Token(self.forms[concept] + suffix, meanings.CONCEPTS[concept], entity, role, concept)]

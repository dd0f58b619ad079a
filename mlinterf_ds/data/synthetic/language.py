"""Artificial languages: their names, word forms, scripts, distances, and the grammar that turns meanings into sentences.

Every language names the same concepts (see `meanings`). Languages differ in the forms of their concepts, in word order, in
morphology and in script. `syn` owns the family's common word list; any other language takes a stated share of its forms
from that list and invents the rest.
"""

import random
import re
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from typing import NamedTuple

from mlinterf_ds.data.synthetic import meanings
from mlinterf_ds.data.synthetic.meanings import (
    CLASS_SIZE,
    CONCEPTS,
    NAMES,
    NOUNS,
    PUNCTUATION,
    SUFFIXES,
    Clause,
    Meaning,
    Phrase,
)
from mlinterf_ds.errors import UserError

CONSONANTS, VOWELS = "ptkbdgmnslrvzf", "aeiou"
# One letter for each of the 19 sounds. Syllables start with a consonant: Devanagari's vowel signs always have a bearer.
SCRIPTS = {
    "latin": CONSONANTS + VOWELS,
    "cyrillic": "пткбдгмнслрвзф" + "аеиоу",
    "greek": "πτκβδγμνσλρχζφ" + "αειου",
    "georgian": "პტკბდგმნსლრვზფ" + "აეიოუ",
    "devanagari": "पतकबदगमनसलरवजफ" + "ा\u0947\u093f\u094b\u0941",
}
PLURAL_SUFFIX, PAST_SUFFIX, AGREEMENT_SUFFIX, OBJECT_CASE, ADPOSITION_CASE = SUFFIXES
HOMONYMS = 0.25  # share of verbs, adjectives and name words that are spelt like a noun
NAME_FORMS = "syn, syn-close, syn-mid, syn-far, or a numbered sibling such as syn-close-2 (numbers from 2)"


@dataclass(frozen=True)
class SyntheticLanguage:
    """The parameters of a language. `language(name)` returns those of a named one; any other may be built directly."""

    name: str  # also names the language's own (non-parallel) training stream
    draw: int  # which invented word list; 0 is the family's common one, which `syn` uses
    share: float = 0.2  # of concepts whose form is the common one, at every frequency alike
    adjective_after: bool = False  # the noun
    postpositions: bool = False
    verb_final: bool = False  # subject-object-verb instead of subject-verb-object
    cases: bool = False  # objects and complements of adpositions carry a case suffix
    script: str = "latin"  # of the invented forms; common forms stay Latin, as loanwords often do

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise UserError(f"synthetic language '{self.name}': share is {self.share}; give a share from 0 to 1")
        if self.script not in SCRIPTS:
            raise UserError(
                f"synthetic language '{self.name}': unknown script '{self.script}'; use {', '.join(SCRIPTS)}"
            )


def language(name: str | SyntheticLanguage) -> SyntheticLanguage:
    """Returns the language of that name; one that is given by its parameters is returned as it is.

    `syn-close` has the grammar of `syn`; `syn-mid` puts adjective and adposition after the noun; `syn-far` is
    verb-final too, has case suffixes and another script. All share 20% of their word forms with `syn` and with each
    other. Numbered siblings differ in their invented words (and `syn-far-N` in the script: Cyrillic, Greek, Georgian,
    Devanagari in turn). Raises UserError for any other name.
    """
    if isinstance(name, SyntheticLanguage):
        return name
    if name == "syn":
        return SyntheticLanguage("syn", draw=0, share=1.0)
    match = re.fullmatch(r"syn-(close|mid|far)(?:-([1-9][0-9]{0,5}))?", name)
    if match is None or match[2] == "1":
        raise UserError(f"unknown synthetic language '{name}'; the names are {NAME_FORMS}")
    kind, number = match[1], int(match[2] or 1)
    # Draws of the three kinds never coincide, so that only the common words are common.
    base = SyntheticLanguage(name, draw=3 * number + ("close", "mid", "far").index(kind))
    if kind == "close":
        return base
    base = replace(base, adjective_after=True, postpositions=True)
    if kind == "mid":
        return base
    others = [script for script in SCRIPTS if script != "latin"]
    return replace(base, verb_final=True, cases=True, script=others[(number - 1) % len(others)])


def overlap(a: SyntheticLanguage, b: SyntheticLanguage) -> float:
    """Returns the expected share of words that have the same form in both languages, suffixes not counted."""
    # The common list in Latin letters is itself whatever the share.
    share_a, share_b = (1.0 if x.draw == 0 and x.script == "latin" else x.share for x in (a, b))
    if (a.draw, a.script) == (b.draw, b.script):
        return 1 - abs(share_a - share_b)
    return min(share_a, share_b)


def distance(a: str | SyntheticLanguage, b: str | SyntheticLanguage) -> float:
    """Returns how far apart two languages are: the mean of four parts, each from 0 (same) to 1.

    (1 - overlap of word forms, differing share of the three word-order parameters, differing morphology, differing
    script) / 4. Symmetric; 0 for a language and itself. From `syn`: close 0.20, mid 0.37, far 0.95.
    """
    a, b = language(a), language(b)
    order = (a.adjective_after != b.adjective_after, a.postpositions != b.postpositions, a.verb_final != b.verb_final)
    return (1 - overlap(a, b) + sum(order) / len(order) + (a.cases != b.cases) + (a.script != b.script)) / 4


def is_common(concept: int, share: float) -> bool:
    """Returns whether a language with this share takes the concept's form from the common list.

    Multiples of the golden ratio fill [0, 1) evenly over any run of concepts, so the share holds for nouns as for verbs
    and for frequent words as for rare ones; and the common words of a small share are common at a larger one too.
    """
    return (concept * 0.6180339887498949) % 1 < share


@cache
def lexicon(spoken: SyntheticLanguage) -> tuple[str, ...]:
    """Returns the form of every concept, `(len(CONCEPTS),)`: stems, function words, suffixes and punctuation."""
    common = _word_list(0)
    invented = _word_list(spoken.draw)
    letters = str.maketrans(SCRIPTS["latin"], SCRIPTS[spoken.script])
    own = [form.translate(letters) for form in invented]
    # A common suffix is written in the language's own letters: it is part of its words.
    common = common[: SUFFIXES.start] + tuple(common[c].translate(letters) for c in SUFFIXES)
    return tuple(common[c] if is_common(c, spoken.share) else own[c] for c in range(len(CONCEPTS)))


@cache
def _word_list(draw: int) -> tuple[str, ...]:
    """Invents a Latin form for each concept. Forms differ from each other, except homonyms, and from the common list's."""
    rng = random.Random(f"words {draw}")
    # Each list has its own favourite sounds, so languages also differ in their letter statistics.
    consonants, vowels = ([rng.random() + 0.2 for _ in sounds] for sounds in (CONSONANTS, VOWELS))
    taken = set(_word_list(0)) if draw else set()

    def syllable() -> str:
        return rng.choices(CONSONANTS, consonants)[0] + rng.choices(VOWELS, vowels)[0]

    def fresh(syllables: int) -> str:
        while True:
            form = "".join(syllable() for _ in range(syllables))
            if rng.random() < 0.4:
                form += rng.choices(CONSONANTS, consonants)[0]
            if form not in taken:
                taken.add(form)
                return form

    # Function words and suffixes, numbered after the names, have one syllable; content words have two or three.
    forms = [PUNCTUATION.get(c) or fresh(1 if c >= NAMES.stop else rng.choice((2, 2, 3))) for c in range(len(CONCEPTS))]
    ambiguous = [c for c, concept in enumerate(CONCEPTS) if concept in ("VERB", "ADJ", "PROPN")]
    # About as frequent in its own list as the noun is in its class, so that neither sense always wins.
    nouns = sorted(rng.sample(NOUNS, len(NOUNS)), key=lambda noun: noun % CLASS_SIZE)
    for concept in rng.sample(ambiguous, round(HOMONYMS * len(ambiguous))):
        part = [c for c in ambiguous if CONCEPTS[c] == CONCEPTS[concept]]
        forms[concept] = forms[nouns.pop(part.index(concept) * len(nouns) // len(part))]
    return tuple(forms)


# --- from a meaning to a sentence, with its gold annotation ----------------------------------------------------------------
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

"""The meaning space that all synthetic languages share: concepts, what selects what, and how meanings are sampled.

A meaning is a tree of concept numbers. It is sampled independently of any language, by random choices from the tables
below, and `language.Grammar` turns it into a sentence of a language.
"""

import hashlib
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import accumulate
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from mlinterf_ds.errors import UserError

# --- concepts: one flat numbering, the part of speech of each -------------------------------------------------------
CLASSES, CLASS_SIZE = 12, 20  # noun classes; within each, nouns by falling frequency
HUMAN, PLACE, GROUP = 0, 1, 2  # the classes that have proper names
ENTITY = {HUMAN: "PER", PLACE: "LOC", GROUP: "ORG"}
FUNCTION_WORDS = (
    ("DET", ("the", "a", "this", "every", "many")),
    ("ADP", ("in", "from", "with", "for", "on", "by")),
    ("CCONJ", ("and", "but")),
    ("SCONJ", ("because", "when")),
    ("AUX", ("will", "can")),
    ("PART", ("not",)),
    ("PRON", ("who", "where", "what")),  # asking for HUMAN, PLACE, anything else
    ("PUNCT", (".", "?")),
    ("SUFFIX", ("plural", "past", "agreement", "object case", "adposition case")),
)
_CONTENT = (("NOUN", CLASSES * CLASS_SIZE), ("VERB", 96), ("ADJ", 72), ("ADV", 24), ("PROPN", 200))
CONCEPTS: tuple[str, ...] = tuple(pos for pos, n in _CONTENT for _ in range(n)) + tuple(
    pos for pos, words in FUNCTION_WORDS for _ in words
)


def _of(pos: str) -> range:
    """Returns the concepts of a part of speech, which are contiguous."""
    return range(CONCEPTS.index(pos), CONCEPTS.index(pos) + CONCEPTS.count(pos))


NOUNS, VERBS, ADJECTIVES, ADVERBS, NAMES = (_of(pos) for pos, _ in _CONTENT)
DETERMINERS, ADPOSITIONS, COORDINATORS, SUBORDINATORS, AUXILIARIES, NEGATION, QUESTION_WORDS, STOPS, SUFFIXES = (
    _of(pos) for pos, _ in FUNCTION_WORDS
)
THE, A, THIS, EVERY, MANY = DETERMINERS
WHO, WHERE, WHAT = QUESTION_WORDS
ASKED_BY: dict[int | None, int] = {HUMAN: WHO, PLACE: WHERE}  # WHAT asks for any other class
WILL, CAN = AUXILIARIES
PUNCTUATION = dict(zip(STOPS, ".?", strict=True))
GIVEN, FAMILY, TOWN, TOWN_TAIL, FIRM, FIRM_TAIL = (
    NAMES[start:stop] for start, stop in ((0, 40), (40, 80), (80, 128), (128, 140), (140, 180), (180, 200))
)

# --- probabilities ---------------------------------------------------------------------------------------------------
ZIPF_OFFSET = 1.5  # the k-th most frequent of a list has weight 1 / (k + 1.5), k from 0
RANDOM_PHRASES = 0.08  # share of noun phrases that ignore what the verb or adposition selects
NAMED = 0.5  # share of names among the phrases of a class that has names
REUSED = 0.4  # share of organisations' names that start with a person's or a place's word
TWO_WORDS = {HUMAN: 0.5, PLACE: 0.2, GROUP: 0.4}  # share of names with a second word
PLURAL, DETERMINED, MODIFIED = 0.25, 0.8, 0.35
NEGATIVE, ADVERB, ADJUNCT, SECOND_CLAUSE, QUESTION = 0.1, 0.35, 0.4, 0.27, 0.06
INTRANSITIVE = 0.25  # share of intransitive verb pairs
# What the verbs select, in turn from the most frequent: a class with names, or None for one of the nine others.
SUBJECT_CLASSES = (HUMAN, GROUP, None, HUMAN, None, GROUP, HUMAN, PLACE)
OBJECT_CLASSES = (None, HUMAN, None, PLACE, None, GROUP, None)
PRESENT, PAST, FUTURE, ABLE = range(4)
SUBJECT, OBJECT, COMPLEMENT = range(3)


T = TypeVar("T")


class Table(Generic[T]):
    """A discrete distribution over `values`."""

    __slots__ = ("bounds", "values")

    def __init__(self, values: Sequence[T], weights: Sequence[float]) -> None:
        total = sum(weights)
        self.values = tuple(values)
        self.bounds = [part / total for part in accumulate(weights)][:-1]  # the last is 1: every draw is below it


class Draw:
    """Makes random choices out of a row of uniform numbers."""

    def __init__(self, uniforms: Sequence[float]) -> None:
        self._next: Callable[[], float] = iter(uniforms).__next__

    def pick(self, table: Table[T]) -> T:
        return table.values[bisect_right(table.bounds, self._next())]

    def choose(self, values: Sequence[T]) -> T:
        """Returns any of the values with the same probability."""
        return self.pick(Table(values, [1.0] * len(values)))

    def chance(self, probability: float) -> bool:
        return self._next() < probability


# --- meanings --------------------------------------------------------------------------------------------------------
class Head(NamedTuple):
    """The word that a noun phrase is built on: a noun, or the first word of a name."""

    word: int
    noun_class: int
    entity: str = ""  # PER, LOC, ORG; empty unless a name


class Phrase(NamedTuple):
    """A noun phrase: one noun, the words of a name, or a question word."""

    words: tuple[int, ...]
    noun_class: int | None  # None for a question word
    entity: str = ""  # PER, LOC, ORG; empty unless a name
    plural: bool = False
    determiner: int | None = None
    adjective: int | None = None


class Clause(NamedTuple):
    verb: int
    tense: int
    negative: bool
    subject: Phrase
    object: Phrase | None  # present exactly if the verb is transitive
    adverb: int | None
    adposition: int | None  # with its complement, or neither
    complement: Phrase | None


class Meaning(NamedTuple):
    """One or two clauses; a question asks for the phrase that is a question word."""

    clauses: tuple[Clause, ...]
    link: int | None = None  # the conjunction, with two clauses
    question: bool = False


class Selection(NamedTuple):
    """What a verb or an adposition selects for one of its phrases."""

    head: Table[Head]
    question_word: Table[int]


class Verb(NamedTuple):
    """What a verb selects. Verbs 2k and 2k + 1 of the frequency list are opposites and select the same."""

    subject: Selection
    object: Selection | None  # None: intransitive
    adverb: Table[int]
    adposition: Table[int]


class World(NamedTuple):
    verbs: dict[int, Verb]
    adjectives: tuple[Table[int], ...]  # by noun class
    complements: dict[int, Selection]  # by adposition


# --- what is frequent, and what selects what: one world for every language and seed ----------------------------------
def zipf_weights(count: int) -> list[float]:
    return [1 / (k + ZIPF_OFFSET) for k in range(count)]


def zipf(values: Sequence[T]) -> Table[T]:
    return Table(values, zipf_weights(len(values)))


def _heads(noun_class: int) -> list[tuple[Head, float]]:
    """Returns a class's heads with their probabilities: nouns and, if the class has names, first words of names."""
    nouns = [Head(noun, noun_class) for noun in NOUNS[noun_class * CLASS_SIZE : (noun_class + 1) * CLASS_SIZE]]
    heads = _shared_out(1 - NAMED if noun_class in ENTITY else 1, nouns, zipf_weights(len(nouns)))
    if noun_class not in ENTITY:
        return heads
    own, reused = NAME_HEADS[noun_class], (*GIVEN, *FAMILY, *TOWN) if noun_class == GROUP else ()
    named = [Head(word, noun_class, ENTITY[noun_class]) for word in (*own, *reused)]
    share = REUSED if reused else 0.0
    heads += _shared_out(NAMED * (1 - share), named[: len(own)], zipf_weights(len(own)))
    return heads + _shared_out(NAMED * share, named[len(own) :], [1.0] * len(reused))


def _shared_out(total: float, values: list[Head], weights: list[float]) -> list[tuple[Head, float]]:
    """Shares `total` among the values by weight."""
    return [(value, total * weight / sum(weights)) for value, weight in zip(values, weights, strict=True)]


VERB = zipf(VERBS)
NAME_HEADS = {HUMAN: GIVEN, PLACE: TOWN, GROUP: FIRM}
NAME_TAILS = {HUMAN: zipf(FAMILY), PLACE: zipf(TOWN_TAIL), GROUP: zipf(FIRM_TAIL)}
SINGULAR_DETERMINER = Table((THE, A, THIS, EVERY), (5, 3, 1, 1))
PLURAL_DETERMINER = Table((THE, MANY, THIS), (5, 3, 1))
TENSE = Table((PRESENT, PAST, FUTURE, ABLE), (40, 40, 12, 8))
LINK = zipf((*COORDINATORS, *SUBORDINATORS))


@cache
def selection(noun_class: int) -> Selection:
    """Returns a selection of phrases of this class, except for the random ones."""
    weights = [RANDOM_PHRASES / CLASSES] * CLASSES
    weights[noun_class] += 1 - RANDOM_PHRASES
    heads = [(head, weights[c] * weight) for c in range(CLASSES) for head, weight in _heads(c)]
    asked = (weights[HUMAN], weights[PLACE], 1 - weights[HUMAN] - weights[PLACE])
    return Selection(Table(*zip(*heads, strict=True)), Table(QUESTION_WORDS, asked))


@cache
def world() -> World:
    """Returns the one meaning space of all languages."""
    rng = random.Random("one meaning space")
    things = range(len(ENTITY), CLASSES)
    verbs = {}
    for k, first in enumerate(VERBS[::2]):
        subject, wanted = SUBJECT_CLASSES[k % len(SUBJECT_CLASSES)], OBJECT_CLASSES[k % len(OBJECT_CLASSES)]
        verbs[first] = verbs[first + 1] = Verb(
            selection(rng.choice(things) if subject is None else subject),
            None if rng.random() < INTRANSITIVE else selection(rng.choice(things) if wanted is None else wanted),
            adverb=zipf(rng.sample(ADVERBS, 8)),
            adposition=zipf(rng.sample(ADPOSITIONS, len(ADPOSITIONS))),
        )
    return World(
        verbs,
        adjectives=tuple(zipf(rng.sample(ADJECTIVES, 12)) for _ in range(CLASSES)),
        complements={a: selection(c) for a, c in zip(ADPOSITIONS, (PLACE, PLACE, HUMAN, GROUP, 3, 4), strict=True)},
    )


# --- sampling --------------------------------------------------------------------------------------------------------
UNIFORMS = 64  # random numbers that suffice for a meaning: at most 25 a clause and 3 more
BLOCK = 256  # examples whose random numbers are made at once


def draws(language: str, kind: str, count: int, seed: int, split: str, width: int = UNIFORMS) -> Iterator[Draw]:
    """Yields the random choices, `width` at most, of each of the examples 0 to `count - 1` of a kind.

    Each language has its own numbers for `train`; all languages share those of any other split. Raises UserError for a
    negative count.
    """
    if count < 0:
        raise UserError(f"synthetic language '{language}': asked for {count} examples; ask for 0 or more")
    owner = language if split == "train" else "every language"
    # hashlib, not hash(): the latter differs between processes.
    key = int.from_bytes(hashlib.sha256(f"{kind}|{split}|{owner}|{seed}".encode()).digest()[:16], "big")
    for block in range(0, count, BLOCK):
        rows = np.random.default_rng([key, block]).random((BLOCK, width))
        yield from map(Draw, rows[: count - block].tolist())


def sample_meaning(draw: Draw) -> Meaning:
    """Samples a sentence's meaning: one or two statements, or a question. Every choice shows in the sentence."""
    if draw.chance(QUESTION):
        return Meaning((sample_clause(draw, question=True),), question=True)
    first = sample_clause(draw)
    if not draw.chance(SECOND_CLAUSE):
        return Meaning((first,))
    link = draw.pick(LINK)
    return Meaning((first, sample_clause(draw)), link)


def sample_clause(draw: Draw, question: bool = False) -> Clause:
    """Samples a clause: the verb first, since it selects all the rest."""
    verb = draw.pick(VERB)
    frame = world().verbs[verb]
    asked = -1
    if question:
        asked = draw.choose((SUBJECT, COMPLEMENT) if frame.object is None else (SUBJECT, OBJECT, COMPLEMENT))
    tense, negative = draw.pick(TENSE), draw.chance(NEGATIVE)
    subject = sample_phrase(draw, frame.subject, asked == SUBJECT)
    wanted = None if frame.object is None else sample_phrase(draw, frame.object, asked == OBJECT)
    adverb = draw.pick(frame.adverb) if draw.chance(ADVERB) else None
    adposition, complement = None, None
    if asked == COMPLEMENT or draw.chance(ADJUNCT):
        adposition, complement = sample_adjunct(draw, verb, asked == COMPLEMENT)
    return Clause(verb, tense, negative, subject, wanted, adverb, adposition, complement)


def sample_adjunct(draw: Draw, verb: int, asked: bool = False) -> tuple[int, Phrase]:
    """Samples an adposition by the verb's preference, and its complement."""
    adposition = draw.pick(world().verbs[verb].adposition)
    return adposition, sample_phrase(draw, world().complements[adposition], asked)


def sample_phrase(draw: Draw, wanted: Selection, asked: bool = False) -> Phrase:
    """Samples a phrase: a question word if `asked`, else a name or a noun of a class that is mostly the wanted one."""
    if asked:
        return Phrase((draw.pick(wanted.question_word),), None)
    word, noun_class, entity = draw.pick(wanted.head)
    if entity:
        words = (word, draw.pick(NAME_TAILS[noun_class])) if draw.chance(TWO_WORDS[noun_class]) else (word,)
        return Phrase(words, noun_class, entity)
    plural = draw.chance(PLURAL)
    determiner, adjective = None, None
    if draw.chance(DETERMINED):
        determiner = draw.pick(PLURAL_DETERMINER if plural else SINGULAR_DETERMINER)
    if draw.chance(MODIFIED):
        adjective = draw.pick(world().adjectives[noun_class])
    return Phrase((word,), noun_class, "", plural, determiner, adjective)

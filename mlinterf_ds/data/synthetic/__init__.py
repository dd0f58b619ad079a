"""Synthetic languages: a seeded family of artificial languages over one shared meaning space.

How far two of them are apart, and what a word means, is known exactly, so that experiments run in minutes without a
download and instruments can be checked. What holds here need not hold for natural languages: these have no discourse
beyond a sentence, no idioms, shallow syntax, and meanings that are drawn from tables.

- 632 content concepts (240 nouns in 12 classes, 96 verbs in pairs of opposites, 72 adjectives, 24 adverbs, 200 name
  words), 21 function words, 5 suffixes and 2 stops. Verbs select the class of subject and object, the adverb and the
  adposition; adpositions select their complement, noun classes their adjectives; 8% of noun phrases ignore all that.
- Each list is Zipfian, 1 / (k + 1.5), and so is the text: exponent about 0.9 to 1 over its commonest 500 words.
- Organisations' names start with a person's or a place's word 40% of the time, and 25% of verbs, adjectives and name
  words are spelt like a noun: part of speech and entity type need context.
- `syn` is the base language; `syn-close`, `syn-mid`, `syn-far` and numbered siblings (`syn-close-2`) lie at stated
  distances from it (`distance`). `SyntheticLanguage` has the parameters; every function takes one in place of a name.
- Number, tense, agreement and case are suffixes inside the word, for subword tokenizers to find.
- Tokens are separated by one space, the final stop included; all is lower-case, so letters don't give names away.
  Sentences have about 9 tokens.
- Example number i depends on the language, the seed, the split and i, but not on how many are asked for. Each language has
  a `train` split of its own; any other split has the same meanings, in the same order, in every language.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mlinterf_ds.data.synthetic.language import Grammar, SyntheticLanguage, Token, distance, language
from mlinterf_ds.data.synthetic.meanings import Meaning, draws, sample_meaning
from mlinterf_ds.data.synthetic.tasks import Entailment, Question, entailments, questions
from mlinterf_ds.errors import UserError
from mlinterf_ds.files import replacing

__all__ = [
    "Annotated",
    "Entailment",
    "Question",
    "SyntheticLanguage",
    "aligned",
    "annotated",
    "distance",
    "entailments",
    "is_known",
    "language",
    "parallel",
    "questions",
    "sentences",
    "write_sentences",
]


class Annotated(NamedTuple):
    """A sentence with gold labels, one of each per token."""

    tokens: tuple[str, ...]
    pos: tuple[str, ...]  # UPOS
    entities: tuple[str, ...]  # IOB2 over PER, LOC, ORG
    meaning: Meaning


def sentences(name: str | SyntheticLanguage, count: int, seed: int, split: str = "train") -> Iterator[str]:
    """Yields `count` sentences of the language, tokens separated by spaces."""
    spoken = language(name)
    realise = Grammar(spoken).text
    for draw in draws(spoken.name, "text", count, seed, split):
        yield realise(sample_meaning(draw))


def annotated(name: str | SyntheticLanguage, count: int, seed: int, split: str = "train") -> Iterator[Annotated]:
    """Yields `count` sentences with part-of-speech tags, entities and meanings; they are not those of `sentences`."""
    spoken = language(name)
    speak = Grammar(spoken)
    for draw in draws(spoken.name, "annotated", count, seed, split):
        meaning = sample_meaning(draw)
        forms, pos, entities, _, _ = zip(*speak.tokens(meaning), strict=True)
        yield Annotated(forms, pos, entities, meaning)


def parallel(names: Sequence[str | SyntheticLanguage], count: int, seed: int) -> Iterator[list[list[Token]]]:
    """Yields `count` sentences, each in all of these languages: a word's `concept` is what it means in every one of them."""
    grammars = [Grammar(language(name)) for name in names]
    for draw in draws("every language", "parallel", count, seed, "test"):
        meaning = sample_meaning(draw)
        yield [speak.tokens(meaning) for speak in grammars]


def aligned(left: Sequence[Token], right: Sequence[Token]) -> set[tuple[int, int]]:
    """The words of two parallel sentences that say the same, (of the left, of the right).

    Of a concept that is said twice the first goes with the first: every grammar keeps their order.
    """
    places = [
        {(token.concept, sum(t.concept == token.concept for t in side[:k])): k for k, token in enumerate(side)}
        for side in (left, right)
    ]
    return {(places[0][key], places[1][key]) for key in places[0].keys() & places[1].keys()}


def is_known(name: str) -> bool:
    """Whether a synthetic language has this name."""
    try:
        language(name)
    except UserError:
        return False
    return True


def write_sentences(name: str, path: Path, count: int, seed: int) -> None:
    """Writes `count` sentences of the train split, one a line; the file appears whole or not at all.

    Raises UserError if it cannot be written: the folder is missing, permission is denied, the disk is full.
    """
    try:
        with replacing(path) as file:
            file.writelines(f"{sentence}\n".encode() for sentence in sentences(name, count, seed))
    except OSError as error:
        raise UserError(
            f"{path}: synthetic text cannot be written ({error.strerror}); choose another folder or free some space"
        ) from error

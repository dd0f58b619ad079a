"""How much there is to learn in a synthetic language: bounds on its entropy, from the generator's own probabilities."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from math import exp, log
from typing import Any, NamedTuple, TypeVar

from mlinterf_ds.data.synthetic.draws import uniforms
from mlinterf_ds.data.synthetic.grammar import Draw, Table, sample_meaning
from mlinterf_ds.data.synthetic.language import SyntheticLanguage, resolve
from mlinterf_ds.data.synthetic.sentence import Grammar, Token, grammar

T = TypeVar("T")
Choice = tuple[Table[Any], Any]  # the distribution and the value drawn
MASKED_SENTENCES = 100  # the masked bound replays every alternative of every choice: a few hundredths of a second each


class EntropyFloor(NamedTuple):
    """Bounds in nats per word, the final stop counted as a word; `exp` of each is a perplexity per word.

    A model that reads from left to right cannot do better than the text's entropy, which lies between `text_lower` and
    `text_upper`. A masked model sees both sides, so its floor is lower: no predictor of a masked word, however many words
    are masked with it, beats `masked_lower` on average. `unigram` is the loss of word frequencies alone.
    """

    text_upper: float
    text_lower: float
    masked_lower: float
    unigram: float
    characters_per_word: float  # one separator included

    def bits_per_character(self, nats_per_word: float) -> float:
        """Converts nats per word to bits per character, separators counted."""
        return nats_per_word / log(2) / self.characters_per_word


class Weighing(Draw):
    """A draw that remembers its choices and adds up their log probabilities, in nats."""

    def __init__(self, uniforms: Sequence[float]) -> None:
        super().__init__(uniforms)
        self.log_probability = 0.0
        self.choices: list[Choice] = []

    def pick(self, table: Table[T]) -> T:
        return self._weigh(table, super().pick(table))

    def chance(self, probability: float) -> bool:
        return self._weigh(_coin(probability), super().chance(probability))

    def _weigh(self, table: Table[T], value: T) -> T:
        self.log_probability += table.log_probability[value]
        self.choices.append((table, value))
        return value


class Forced(Weighing):
    """A draw that makes the given choices in turn."""

    def __init__(self, values: Iterable[Any]) -> None:
        super().__init__(())
        self.values = iter(values)

    def pick(self, table: Table[T]) -> T:
        value: T = next(self.values, None)  # type: ignore[assignment]  # None is in no table
        if value not in table.log_probability:
            raise Impossible
        return self._weigh(table, value)

    def chance(self, probability: float) -> bool:
        return self.pick(_coin(probability))


class Impossible(Exception):
    """The forced choices do not derive any sentence."""


@cache
def _coin(probability: float) -> Table[bool]:
    return Table((True, False), (probability, 1 - probability))


def entropy_floor(
    name: str | SyntheticLanguage, count: int = 20_000, seed: int = 0, masked_count: int = MASKED_SENTENCES
) -> EntropyFloor:
    """Returns bounds for the text of `sentences`, averaged over `count` of them (`masked_count` for the masked bound).

    - text_upper: the mean negative log probability of the sampled choices. The choices determine the sentence, and no
      other derivation is counted, so this is at least the text's entropy.
    - text_lower: that, less the uncertainty that the text leaves about the choices. The words' concepts and entity types
      determine the choices; given the text that uncertainty is at most the sum, over words, of the entropy of concept
      and type given the form alone (counted on the sample; few forms are ambiguous).
    - masked_lower: for each choice, the entropy of the word that shows it, given all other choices and words, which is
      more than any model sees. Probabilities are exact; changes that need two choices at once are left out.
    """
    spoken = resolve(name)
    speak = grammar(spoken)
    senses: Counter[tuple[str, int, str]] = Counter()
    nats = 0.0
    masked: list[tuple[float, int]] = []
    for number, draw in enumerate(map(Weighing, uniforms(spoken, "text", count, seed, "train"))):
        tokens = speak.tokens(sample_meaning(draw))
        nats -= draw.log_probability
        senses.update((token.form, token.concept, token.entity) for token in tokens)
        if number < masked_count:
            masked.append((masked_nats(speak, draw, tokens), len(tokens)))
    forms: Counter[str] = Counter()
    for (form, _, _), times in senses.items():
        forms[form] += times
    words = forms.total()
    ambiguity = entropy(senses.values()) - entropy(forms.values())
    return EntropyFloor(
        text_upper=nats / words,
        text_lower=nats / words - ambiguity,
        masked_lower=sum(nats for nats, _ in masked) / sum(length for _, length in masked),
        unigram=entropy(forms.values()),
        characters_per_word=sum(times * (len(form) + 1) for form, times in forms.items()) / words,
    )


def entropy(weights: Collection[float]) -> float:
    """Returns the entropy, in nats, of the distribution with these unnormalised weights."""
    total = sum(weights)
    return -sum(weight / total * log(weight / total) for weight in weights if weight)


def masked_nats(speak: Grammar, made: Weighing, tokens: list[Token]) -> float:
    """Returns a lower bound, in nats, on what is unknown about this sentence's words, each masked in turn.

    Each choice is replaced by each alternative, the others kept. Alternatives that change one and the same word compete
    for it; a word that shows several choices (a noun and its number) gets the sum, which is at most its entropy.
    """
    sentence = [token.form for token in tokens]
    values = [value for _, value in made.choices]
    total = 0.0
    for number, (table, value) in enumerate(made.choices):
        same = exp(made.log_probability)  # probability of the derivations that give the same sentence
        rivals: dict[int, Counter[str]] = {}  # by position: the probability of each other form
        for other in table.values:
            if other == value:
                continue
            forms, probability = _replayed(speak, [*values[:number], other, *values[number + 1 :]])
            changed = [n for n, (a, b) in enumerate(zip(sentence, forms, strict=False)) if a != b]
            if len(forms) != len(sentence) or len(changed) > 1:
                continue
            if changed:
                rivals.setdefault(changed[0], Counter())[forms[changed[0]]] += probability  # type: ignore[assignment]
            else:
                same += probability
        total += sum(entropy([same, *other_forms.values()]) for other_forms in rivals.values())
    return total


def _replayed(speak: Grammar, values: list[Any]) -> tuple[list[str], float]:
    """Returns the words and the probability of a derivation, or no words if these choices derive no sentence."""
    draw = Forced(values)
    try:
        meaning = sample_meaning(draw)
    except Impossible:
        return [], 0.0
    if len(draw.choices) != len(values):
        return [], 0.0
    return [token.form for token in speak.tokens(meaning)], exp(draw.log_probability)

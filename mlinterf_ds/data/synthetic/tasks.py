"""Question answering and entailment in synthetic languages; the labels follow from the meanings."""

from collections.abc import Iterator
from itertools import permutations
from typing import Any, NamedTuple

from mlinterf_ds.data.synthetic import meanings
from mlinterf_ds.data.synthetic.language import Grammar, SyntheticLanguage, Token, language
from mlinterf_ds.data.synthetic.meanings import Clause, Draw, Meaning, Phrase, draws, sample_adjunct, sample_clause

CONTEXT_SENTENCES, TRIES = 4, 12  # sentences with different verbs, out of as many sampled clauses
LABELS = ("entailment", "neutral", "contradiction")
ROLES = ("subject", "object", "complement")


class Question(NamedTuple):
    """A question about one sentence of the context; `context[start : start + len(answer)] == answer`."""

    context: str
    question: str
    answer: str
    start: int  # in characters


class Entailment(NamedTuple):
    premise: str
    hypothesis: str
    label: str  # one of LABELS


# --- questions -------------------------------------------------------------------------------------------------------
def questions(name: str | SyntheticLanguage, count: int, seed: int, split: str = "train") -> Iterator[Question]:
    """Yields `count` questions, each on a context of four sentences whose verbs differ, so that there is one answer."""
    spoken = language(name)
    speak = Grammar(spoken)
    for draw in draws(spoken.name, "questions", count, seed, split, width=(TRIES + 1) * meanings.UNIFORMS):
        clauses = _context(draw)
        target = draw.choose(range(len(clauses)))
        asked, role = _question(draw, clauses[target])
        spoken_clauses = [speak.tokens(Meaning((clause,))) for clause in clauses]
        texts = [" ".join(token.form for token in tokens) for tokens in spoken_clauses]
        answer, offset = _answer(spoken_clauses[target], role)
        start = offset + sum(len(text) + 1 for text in texts[:target])
        yield Question(" ".join(texts), speak.text(asked), answer, start)


def _context(draw: Draw) -> list[Clause]:
    """Samples four statements with different verbs (fewer only in the rare case that the tries run out)."""
    clauses: dict[int, Clause] = {}
    for _ in range(TRIES):
        clause = sample_clause(draw)
        if len(clauses) < CONTEXT_SENTENCES:
            clauses.setdefault(clause.verb, clause)
    return list(clauses.values())


def _question(draw: Draw, clause: Clause) -> tuple[Meaning, str]:
    """Returns a question for one of the clause's phrases and that phrase's role; verb, subject and object are kept."""
    role = draw.choose([role for role in ROLES if getattr(clause, role) is not None])
    asked: Phrase = getattr(clause, role)
    word = meanings.ASKED_BY.get(asked.noun_class, meanings.WHAT)
    clause = clause._replace(adverb=None)
    if role != "complement":
        clause = clause._replace(adposition=None, complement=None)
    return Meaning((_put(clause, role, Phrase((word,), None)),), question=True), role


def _put(clause: Clause, role: str, phrase: Phrase) -> Clause:
    changed: dict[str, Any] = {role: phrase}
    return clause._replace(**changed)


def _answer(tokens: list[Token], role: str) -> tuple[str, int]:
    """Returns the phrase's text and its start in the sentence, in characters."""
    first = next(n for n, token in enumerate(tokens) if token.role == role)
    text = " ".join(token.form for token in tokens if token.role == role)
    return text, sum(len(token.form) + 1 for token in tokens[:first])


# --- entailment ------------------------------------------------------------------------------------------------------
def entailments(name: str | SyntheticLanguage, count: int, seed: int, split: str = "train") -> Iterator[Entailment]:
    """Yields `count` pairs; each run of three holds each label once, in random order.

    As in SNLI both sentences speak of the same event and participants. Dropping a modifier entails, adding one is
    neutral, negation or the opposite verb contradicts; in a negated premise dropping and adding change places. One
    pair in four has a negated premise and many hypotheses differ by a second modifier, so that neither a negation
    nor the length of the hypothesis gives the label away.
    """
    spoken = language(name)
    say = Grammar(spoken).text
    triples = draws(spoken.name, "labels", -(-count // 3) if count > 0 else count, seed, split, width=1)
    labels = (label for triple in triples for label in triple.choose(tuple(permutations(LABELS))))
    pairs = draws(spoken.name, "entailments", count, seed, split, width=2 * meanings.UNIFORMS)
    for draw, label in zip(pairs, labels, strict=False):
        premise, hypothesis = _pair(draw, label)
        yield Entailment(say(Meaning((premise,))), say(Meaning((hypothesis,))), label)


def _pair(draw: Draw, label: str) -> tuple[Clause, Clause]:
    """Samples a premise and a hypothesis with that label."""
    negative = draw.chance(0.25)
    clause = sample_clause(draw)._replace(negative=negative)
    modifiers = _modifiers(clause)
    first = draw.choose(modifiers)
    richer, poorer = _with(draw, clause, first), _without(clause, first)
    stronger, weaker = (poorer, richer) if negative else (richer, poorer)  # the stronger entails the weaker
    premise, hypothesis = {
        "entailment": (stronger, weaker),
        "neutral": (weaker, stronger),
        "contradiction": (weaker, weaker) if draw.chance(0.5) else (stronger, stronger),
    }[label]
    if label == "contradiction":
        hypothesis = _opposite(draw, hypothesis)
    if draw.chance(0.5):  # weakens the hypothesis further, which keeps every label
        second = draw.choose(modifiers)
        if second != first:
            hypothesis = _with(draw, hypothesis, second) if negative else _without(hypothesis, second)
    return premise, hypothesis


def _modifiers(clause: Clause) -> list[str]:
    """Returns the modifiers whose dropping or adding has a known effect.

    Adjectives under negation are left out (they would change who is spoken of), after "every" too (all the red dogs are not
    all the dogs), and on names.
    """
    modifiers = ["adverb", "complement"]
    for role in ("subject", "object"):
        phrase: Phrase | None = getattr(clause, role)
        if phrase and not phrase.entity and not clause.negative and phrase.determiner != meanings.EVERY:
            modifiers.append(role)
    return modifiers


def _with(draw: Draw, clause: Clause, modifier: str) -> Clause:
    """Returns the clause with the modifier, which is sampled if it is missing."""
    if modifier == "adverb" and clause.adverb is None:
        return clause._replace(adverb=draw.pick(meanings.world().verbs[clause.verb].adverb))
    if modifier == "complement" and clause.complement is None:
        adposition, complement = sample_adjunct(draw, clause.verb)
        return clause._replace(adposition=adposition, complement=complement)
    if modifier in ("subject", "object"):
        phrase: Phrase = getattr(clause, modifier)
        if phrase.adjective is None:
            assert phrase.noun_class is not None
            adjective = draw.pick(meanings.world().adjectives[phrase.noun_class])
            return _put(clause, modifier, phrase._replace(adjective=adjective))
    return clause


def _without(clause: Clause, modifier: str) -> Clause:
    """Returns the clause without the modifier."""
    if modifier == "adverb":
        return clause._replace(adverb=None)
    if modifier == "complement":
        return clause._replace(adposition=None, complement=None)
    phrase: Phrase = getattr(clause, modifier)
    return _put(clause, modifier, phrase._replace(adjective=None))


def _opposite(draw: Draw, clause: Clause) -> Clause:
    """Returns a contradicting clause: negated or affirmed, or with the opposite verb.

    Under "can" the opposite verb does not contradict: one can do a thing and its opposite.
    """
    if not clause.negative and clause.tense != meanings.ABLE and draw.chance(0.5):
        return clause._replace(verb=meanings.VERBS[(clause.verb - meanings.VERBS.start) ^ 1])
    return clause._replace(negative=not clause.negative)

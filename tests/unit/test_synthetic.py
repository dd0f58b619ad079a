"""The synthetic languages: reproducible, parallel where they should be, with gold labels that are right."""

import os
import subprocess
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from itertools import combinations, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlinterf_ds.data import synthetic
from mlinterf_ds.data.synthetic import (
    Annotated,
    SyntheticLanguage,
    annotated,
    distance,
    entailments,
    language,
    questions,
    sentences,
    write_sentences,
)
from mlinterf_ds.data.synthetic.language import SCRIPTS, Grammar, is_common, lexicon, overlap
from mlinterf_ds.data.synthetic.meanings import (
    CONCEPTS,
    FAMILY,
    GIVEN,
    NEGATION,
    NOUNS,
    PRESENT,
    PUNCTUATION,
    QUESTION_WORDS,
    SUFFIXES,
    TENSE,
    TOWN,
    VERB,
    VERBS,
    Draw,
    Table,
    draws,
    sample_meaning,
    world,
)
from mlinterf_ds.errors import UserError

LANGUAGES = ("syn", "syn-close", "syn-mid", "syn-far", "syn-far-4")
CONTENT = {"NOUN", "VERB", "ADJ", "ADV", "PROPN"}
POS = {pos for pos in CONCEPTS if pos != "SUFFIX"}
FINGERPRINT = """
import hashlib
from mlinterf_ds.data.synthetic import *
print(hashlib.sha256(repr([
    list(make(name, 10, 7, split))
    for make in (sentences, annotated, questions, entailments)
    for name in ("syn", "syn-mid-3", "syn-far")
    for split in ("train", "test")
]).encode()).hexdigest())
"""


@cache
def sample(name: str) -> list[Annotated]:
    """Annotated sentences of a language: made once for the tests that count things in many of them."""
    return list(annotated(name, 5000, 0))


def custom(**changes: object) -> SyntheticLanguage:
    return SyntheticLanguage(**{"name": "mine", "draw": 1000, **changes})  # type: ignore[arg-type]


# --- reproducible ----------------------------------------------------------------------------------------------------
def test_processes_agree_whatever_their_hash_seed() -> None:
    def fingerprint(hash_seed: str) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", FINGERPRINT]
        root = Path(synthetic.__file__).parents[2]
        return subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True).stdout

    assert fingerprint("1") == fingerprint("2") != ""


@pytest.mark.parametrize("make", [sentences, annotated, questions, entailments])
def test_an_example_does_not_depend_on_how_many_are_asked_for(make: Callable) -> None:
    assert list(make("syn-mid", 300, 1)) == list(islice(make("syn-mid", 1000, 1), 300))
    assert list(make("syn-mid", 50, 1)) != list(make("syn-mid", 50, 2))
    assert len(list(make("syn-mid", 259, 1))) == 259
    assert list(make("syn-mid", 0, 1)) == []


def test_the_text_of_each_split_differs() -> None:
    assert len({tuple(sentences("syn", 50, 0, split)) for split in ("train", "valid", "test")}) == 3


# --- one meaning space -----------------------------------------------------------------------------------------------
def test_test_sets_are_parallel_and_training_sets_are_not() -> None:
    def meanings(name: str, split: str) -> list:
        return [sentence.meaning for sentence in annotated(name, 100, 0, split)]

    for name in LANGUAGES[1:]:
        assert meanings(name, "test") == meanings("syn", "test")
        same = sum(a == b for a, b in zip(meanings(name, "train"), meanings("syn", "train"), strict=True))
        assert same < 3
        labels = [pair.label for pair in entailments(name, 60, 0, "test")]
        assert labels == [pair.label for pair in entailments("syn", 60, 0, "test")]


@pytest.mark.parametrize("name", LANGUAGES[1:])
def test_the_same_meaning_has_the_same_content_in_every_language(name: str) -> None:
    for ours, base in zip(annotated(name, 300, 5, "test"), annotated("syn", 300, 5, "test"), strict=True):
        assert Counter(ours.pos) == Counter(base.pos)
        assert Counter(ours.entities) == Counter(base.entities)
        ours_concepts = Counter(token.concept for token in Grammar(language(name)).tokens(ours.meaning))
        assert ours_concepts == Counter(token.concept for token in Grammar(language("syn")).tokens(base.meaning))


@pytest.mark.parametrize("name", LANGUAGES)
def test_different_meanings_are_told_apart_by_their_labelled_words(name: str) -> None:
    meanings: dict[tuple, object] = {}
    for sentence in sample(name)[:2000]:
        tokens = Grammar(language(name)).tokens(sentence.meaning)
        labelled = tuple((token.form, token.concept, token.entity) for token in tokens)
        assert meanings.setdefault(labelled, sentence.meaning) == sentence.meaning


# --- gold labels -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", LANGUAGES)
def test_labels_are_valid_and_entities_are_the_names_that_were_meant(name: str) -> None:
    for sentence in sample(name)[:1000]:
        assert len(sentence.tokens) == len(sentence.pos) == len(sentence.entities)
        assert set(sentence.pos) <= POS
        for before, tag in zip(("O", *sentence.entities), sentence.entities, strict=False):
            assert tag == "O" or tag[:2] in ("B-", "I-")
            assert not tag.startswith("I-") or before[1:] == tag[1:]
        meant = Counter(
            phrase.entity
            for clause in sentence.meaning.clauses
            for phrase in (clause.subject, clause.object, clause.complement)
            if phrase and phrase.entity
        )
        assert meant == Counter(tag[2:] for tag in sentence.entities if tag.startswith("B-"))
        named = [tag != "O" for tag in sentence.entities]
        assert named == [pos == "PROPN" for pos in sentence.pos]


@pytest.mark.parametrize("name", LANGUAGES)
def test_part_of_speech_and_entity_type_need_context(name: str) -> None:
    tags: dict[str, Counter[str]] = defaultdict(Counter)
    types: dict[str, set[str]] = defaultdict(set)
    firms: Counter[bool] = Counter()
    for sentence in sample(name):
        for form, pos, entity in zip(sentence.tokens, sentence.pos, sentence.entities, strict=True):
            tags[form][pos] += 1
            types[form] |= {entity[2:]} - {""}
        for token in Grammar(language(name)).tokens(sentence.meaning):
            if token.entity == "B-ORG":
                firms[token.concept in {*GIVEN, *FAMILY, *TOWN}] += 1
    total = sum(counts.total() for counts in tags.values())
    by_form_alone = sum(max(counts.values()) for counts in tags.values()) / total
    assert 0.9 < by_form_alone < 0.985
    assert sum(len(entities) > 1 for entities in types.values()) > 50
    assert firms[True] / firms.total() == pytest.approx(0.4, abs=0.03)


@pytest.mark.parametrize("name", LANGUAGES)
def test_word_order_and_morphology_are_the_stated_ones(name: str) -> None:
    spoken = language(name)
    case = lexicon(spoken)[SUFFIXES[3]]
    for sentence in sample(name)[:500]:
        tokens = Grammar(spoken).tokens(sentence.meaning)
        assert tuple(token.form for token in tokens) == sentence.tokens
        for left, right in pairwise(tokens):
            if spoken.adjective_after:
                assert right.pos != "ADJ" or left.pos == "NOUN"
            else:
                assert left.pos != "ADJ" or right.pos == "NOUN"
            if left.pos == "ADP" and not spoken.postpositions:
                assert right.role == "complement"
            if right.pos == "ADP" and spoken.postpositions:
                assert left.role == "complement"
        roles = [token.pos if token.pos == "VERB" else token.role for token in tokens]
        if len(sentence.meaning.clauses) == 1 and "object" in roles:
            assert (roles.index("VERB") > roles.index("object")) == spoken.verb_final
            heads = [t for t in tokens if t.role == "object" and t.pos in ("NOUN", "PROPN", "PRON")]
            assert heads[-1].form.endswith(case) or not spoken.cases


@pytest.mark.parametrize("name", [f"syn-far-{n}" if n > 1 else "syn-far" for n in range(1, 5)])
def test_forms_are_lower_case_nfc_and_in_their_script(name: str) -> None:
    spoken = language(name)
    for concept, form in enumerate(lexicon(spoken)):
        assert form == unicodedata.normalize("NFC", form) == form.lower() and form.split() == [form]
        if concept not in PUNCTUATION:
            common = is_common(concept, spoken.share) and concept not in SUFFIXES
            assert set(form) <= set(SCRIPTS["latin" if common else spoken.script])
    assert len({language(f"syn-far-{n}").script for n in range(2, 6)}) == 4


# --- questions and entailment ----------------------------------------------------------------------------------------
def is_subsequence(part: list[str], whole: list[str], ending: str) -> bool:
    rest = iter(whole)
    return all(any(word in (other, other.removesuffix(ending)) for other in rest) for word in part)


@pytest.mark.parametrize("name", LANGUAGES)
def test_each_question_has_its_answer_where_it_says(name: str) -> None:
    spoken = language(name)
    asking = tuple(lexicon(spoken)[concept] for concept in QUESTION_WORDS)
    endings = ("", *(lexicon(spoken)[suffix] for suffix in SUFFIXES)) if spoken.cases else ("",)
    agreement = lexicon(spoken)[SUFFIXES[2]]  # question words are singular, what they ask for may be plural
    asked_for: Counter[str] = Counter()
    for item in questions(name, 500, 0):
        assert item.context[item.start : item.start + len(item.answer)] == item.answer
        told = [f"{text} ." for text in item.context.removesuffix(" .").split(" . ")]
        assert len(told) == 4
        words = item.question.removesuffix(" ?").split()
        places = [n for n, word in enumerate(words) if word in {ask + end for ask in asking for end in endings}]
        assert len(places) == 1
        asked_for[words[places[0]]] += 1
        # With the answer in the question word's place the question is told in one sentence, the one with the answer.
        full = [*words[: places[0]], *item.answer.split(), *words[places[0] + 1 :]]
        target = item.context[: item.start].count(" . ") if item.start else 0
        assert [n for n, text in enumerate(told) if is_subsequence(full, text.split(), agreement)] == [target]
    assert len(asked_for) >= 3


def label_of(premise: list[str], hypothesis: list[str], forms: tuple[str, ...]) -> str:
    """Entailment judged from the words alone, by its rules written a second way."""
    negation = forms[NEGATION[0]]
    extra, lost = (Counter(a) - Counter(b) for a, b in ((hypothesis, premise), (premise, hypothesis)))
    if (negation in premise) != (negation in hypothesis):
        return "contradiction"
    endings = ("", *(forms[suffix] for suffix in SUFFIXES))
    for first in VERBS[::2]:
        for end in endings:
            pair = {forms[first] + end, forms[first + 1] + end}
            if len(pair & set(extra)) == len(pair & set(lost)) == 1 and len(pair & {*extra, *lost}) == 2:
                return "contradiction"
    return "neutral" if (lost if negation in premise else extra) else "entailment"


@pytest.mark.parametrize("name", LANGUAGES)
def test_entailment_labels_follow_from_the_words(name: str) -> None:
    pairs = list(entailments(name, 900, 0))
    assert Counter(pair.label for pair in pairs) == dict.fromkeys(("entailment", "neutral", "contradiction"), 300)
    forms = lexicon(language(name))
    for pair in pairs:
        assert pair.premise != pair.hypothesis
        assert label_of(pair.premise.split(), pair.hypothesis.split(), forms) == pair.label, pair
    # Negation in the hypothesis must not give contradiction away.
    negated = Counter(pair.label for pair in pairs if forms[NEGATION[0]] in pair.hypothesis.split())
    assert negated["contradiction"] < 0.6 * negated.total()


# --- distances and names ---------------------------------------------------------------------------------------------
def test_distances_are_ordered_and_siblings_lie_equally_far() -> None:
    assert 0 == distance("syn", "syn") < distance("syn", "syn-close") < distance("syn", "syn-mid")
    assert distance("syn", "syn-mid") < distance("syn", "syn-far") <= 1
    for kind in ("close", "mid", "far"):
        for number in (2, 3, 17):
            assert distance("syn", f"syn-{kind}-{number}") == distance("syn", f"syn-{kind}")
    # By the formula: forms (1 - 0.2), no difference else; two of three word-order parameters more; all differ.
    assert distance("syn", "syn-close") == pytest.approx(0.8 / 4)
    assert distance("syn", "syn-mid") == pytest.approx((0.8 + 2 / 3) / 4)
    assert distance("syn", "syn-far") == pytest.approx((0.8 + 3) / 4)


PARAMETERS = st.builds(
    SyntheticLanguage,
    name=st.just("any"),
    draw=st.integers(0, 2),
    share=st.floats(0, 1),
    adjective_after=st.booleans(),
    postpositions=st.booleans(),
    verb_final=st.booleans(),
    cases=st.booleans(),
    script=st.sampled_from(sorted(SCRIPTS)),
)


@given(PARAMETERS, PARAMETERS)
def test_distance_is_symmetric_bounded_and_zero_to_itself(a: SyntheticLanguage, b: SyntheticLanguage) -> None:
    assert distance(a, b) == distance(b, a)
    assert 0 <= distance(a, b) <= 1
    assert distance(a, a) == 0


WORDS = [concept for concept, pos in enumerate(CONCEPTS) if pos not in ("SUFFIX", "PUNCT")]


@settings(max_examples=20, deadline=None)
@given(PARAMETERS, PARAMETERS)
def test_languages_share_the_stated_part_of_their_words(a: SyntheticLanguage, b: SyntheticLanguage) -> None:
    forms_a, forms_b = lexicon(a), lexicon(b)
    shared = sum(forms_a[concept] == forms_b[concept] for concept in WORDS) / len(WORDS)
    assert shared == pytest.approx(overlap(a, b), abs=0.02)


@pytest.mark.parametrize("a,b", list(combinations(("syn", "syn-close", "syn-close-2", "syn-mid", "syn-far"), 2)))
def test_a_fifth_of_the_words_is_shared_among_frequent_and_rare(a: str, b: str) -> None:
    forms_a, forms_b = lexicon(language(a)), lexicon(language(b))
    for part in (NOUNS[:120], NOUNS[120:], VERBS[:48], VERBS[48:], WORDS):
        shared = sum(forms_a[concept] == forms_b[concept] for concept in part) / len(part)
        assert shared == pytest.approx(0.2, abs=0.035)


@pytest.mark.parametrize(
    "name", ["en", "", "syn-", "syn-near", "syn-close-1", "syn-close-0", "syn-mid-x", "SYN", "syn-2"]
)
def test_unknown_names_are_refused_with_the_forms_that_exist(name: str) -> None:
    with pytest.raises(UserError, match=f"'{name}'.*syn, syn-close, syn-mid, syn-far"):
        list(sentences(name, 1, 0))


def test_impossible_parameters_are_refused() -> None:
    with pytest.raises(UserError, match=r"'mine': share is 1\.5"):
        custom(share=1.5)
    with pytest.raises(UserError, match="'mine': unknown script 'runes'; use latin"):
        custom(script="runes")
    with pytest.raises(UserError, match="asked for -1 examples"):
        list(sentences(custom(), -1, 0))


# --- frequencies -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", LANGUAGES)
def test_words_are_zipfian_and_sentences_about_nine_words_long(name: str) -> None:
    text = [sentence.split() for sentence in sentences(name, 2_500, 0)]
    counts = np.array(sorted(Counter(word for words in text for word in words).values(), reverse=True))[:500]
    slope = np.polyfit(np.log(np.arange(1, 501)), np.log(counts), 1)[0]
    assert -1.1 < slope < -0.85
    assert np.mean([len(words) for words in text]) == pytest.approx(9, abs=0.2)


class Forced(Draw):
    """A draw that makes the given choices in turn and multiplies their probabilities."""

    def __init__(self, choices: list) -> None:
        self.choices, self.probability = iter(choices), 1.0

    def pick(self, table: Table) -> Any:
        choice = next(self.choices)
        self.probability *= chance_of(table, choice)
        return choice

    def chance(self, probability: float) -> bool:
        return self.pick(Table((True, False), (probability, 1 - probability)))


def chance_of(table: Table, value: Any) -> float:
    number = table.values.index(value)
    lower, upper = ([0.0, *table.bounds, 1.0][number + k] for k in (0, 1))
    return upper - lower


def test_the_probability_of_a_meaning_is_the_product_of_the_stated_ones() -> None:
    """Of "noun verb ." in the singular present, with an intransitive verb and a noun of a class without names."""
    verb = next(verb for verb in VERBS if world().verbs[verb].object is None)
    heads = world().verbs[verb].subject.head
    head = next(head for head in heads.values if head.noun_class == 5)
    no = False
    draw = Forced([no, verb, PRESENT, no, head, no, no, no, no, no, no])
    meaning = sample_meaning(draw)
    assert meaning.clauses[0].subject.words == (head.word,) and next(draw.choices, None) is None
    selected = sum(chance_of(heads, other) for other in heads.values if other.noun_class == 5) > 0.5
    p_verb = 1 / (verb - VERBS.start + 1.5) / sum(1 / (k + 1.5) for k in range(96))
    p_noun = 1 / (head.word % 20 + 1.5) / sum(1 / (k + 1.5) for k in range(20))
    p_class = 0.08 / 12 + (0.92 if selected else 0)
    # no question, verb, present, affirmative, class, noun, singular, no determiner, adjective, adverb, adjunct, 2nd clause
    expected = 0.94 * p_verb * 0.4 * 0.9 * p_class * p_noun * 0.75 * 0.2 * 0.65 * 0.65 * 0.6 * 0.73
    assert draw.probability == pytest.approx(expected)


def test_choices_are_drawn_as_often_as_their_probability_says() -> None:
    clauses = [meaning.clauses for meaning in map(sample_meaning, draws("syn", "text", 6_000, 0, "train"))]
    first = [clause[0] for clause in clauses]
    assert np.mean([len(clause) == 2 for clause in clauses]) == pytest.approx(0.94 * 0.27, abs=0.02)
    for tense in TENSE.values:
        assert np.mean([clause.tense == tense for clause in first]) == pytest.approx(chance_of(TENSE, tense), abs=0.02)
    for verb in VERBS[:10]:
        assert np.mean([clause.verb == verb for clause in first]) == pytest.approx(chance_of(VERB, verb), abs=0.02)


# --- files -----------------------------------------------------------------------------------------------------------
def test_text_files_hold_the_sentences(tmp_path: Path) -> None:
    path = tmp_path / "syn-far.txt"
    write_sentences("syn-far", path, 300, 4)
    assert path.read_text(encoding="utf-8").splitlines() == list(sentences("syn-far", 300, 4))
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "syn.txt"
    path.write_text("kept\n")

    def full_disk(*_: object) -> Iterator[str]:
        yield "one"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synthetic, "sentences", full_disk)
    with pytest.raises(UserError, match=r"syn\.txt: synthetic text cannot be written \(No space left on device\)"):
        write_sentences("syn", path, 10, 0)
    assert path.read_text() == "kept\n" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match="cannot be written"):
        write_sentences("syn", tmp_path / "nowhere" / "syn.txt", 10, 0)

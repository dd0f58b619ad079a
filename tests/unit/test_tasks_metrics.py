"""Scores against seqeval, hand-scored examples and closed forms; baselines; chance."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from mlinterf_ds.tasks import TASKS, metrics
from mlinterf_ds.tasks.columns import in_memory
from mlinterf_ds.tasks.ner import spans
from mlinterf_ds.tasks.nli import LABELS, Pair
from mlinterf_ds.tasks.squad import Question


def sentence(words: str, tags: str):
    return in_memory([(words.split(), tags.split())], Path("f"))[0]


GOLD = [sentence("a b c d e", "B-PER I-PER O B-LOC B-LOC"), sentence("f g", "O B-ORG")]
GUESS = [["B-PER", "I-PER", "O", "B-LOC", "I-LOC"], ["B-PER", "B-ORG"]]


def test_entity_f1_by_hand() -> None:
    """Gold: PER(0,2) LOC(3,4) LOC(4,5) ORG(1,2). Guess: PER(0,2) LOC(3,5) PER(0,1) ORG(1,2): 2 of 4 right, of 4."""
    assert TASKS["ner"].score(GOLD, GUESS) == pytest.approx({"f1": 50.0, "precision": 50.0, "recall": 50.0})
    report = TASKS["ner"].report(GOLD, GUESS)
    assert "| ORG | 100.0 | 100.0 | 100.0 | 1 |" in report and "| LOC | 0.0 | 0.0 | 0.0 | 2 |" in report
    assert "| O | 0 | 1 | 0 | 1 |" in report  # gold O, predicted LOC, O, ORG, PER


def test_entity_f1_equals_counts_on_random_tags() -> None:
    """An independent count: spans as sets."""
    gold, guess = tagged_at_random(["O", "O", "B-PER", "I-PER", "B-LOC", "I-LOC"], 200)
    guessed, wanted = ({(n, span) for n, row in enumerate(tags) for span in spans(row)} for tags in (guess, gold))
    right = len(guessed & wanted)
    scores = metrics.entity_scores(gold, guess)
    assert scores["f1"] == pytest.approx(200 * right / (len(guessed) + len(wanted)))
    assert scores["recall"] == pytest.approx(100 * right / len(wanted))


def tagged_at_random(tags: list[str], count: int) -> tuple[list[list[str]], list[list[str]]]:
    """Sentences of 1 to 9 gold tags, and guesses of which about 70% are right."""
    draw = random.Random(0)
    gold = [[draw.choice(tags) for _ in range(draw.randint(1, 9))] for _ in range(count)]
    return gold, [[tag if draw.random() < 0.7 else draw.choice(tags) for tag in row] for row in gold]


def test_reports_show_odd_names_of_labels() -> None:
    tags = [["B-a|b", "O", "B-macroalga"]]
    lines = metrics.entity_report(tags, tags).split("\n")
    assert [line.split(" | ")[0] for line in lines[2:-1]] == ["| a\\|b", "| macroalga", "| micro"]
    assert (
        metrics.confusion(tags, tags, lambda tag: tag[2:] or "O").split("\n")[0]
        == "| gold \\ predicted | O | a\\|b | macroalga |"
    )


def test_pos_f1_is_what_seqeval_makes_of_bare_tags() -> None:
    from seqeval.metrics import f1_score

    def run_f1(gold: list[list[str]], guess: list[list[str]]) -> float:
        return metrics.entity_scores(metrics.runs(gold), metrics.runs(guess))["f1"]

    gold, guess = tagged_at_random(["NOUN", "ADJ", "ADV", "VERB", "PRON"], 50)
    with pytest.warns(UserWarning, match="not to be NE tag"):
        bare = f1_score(gold, guess)
    assert run_f1(gold, guess) == pytest.approx(100 * bare)
    # by hand: runs NOUN(0,2) VERB(2,3) against NOUN(0,1) VERB(1,3): none right; two of three words are
    pair = [["NOUN", "NOUN", "VERB"]], [["NOUN", "VERB", "VERB"]]
    assert run_f1(*pair) == 0 and metrics.tag_accuracy(*pair) == pytest.approx(200 / 3)


@pytest.mark.parametrize(
    "prediction, answers, em, f1",
    [
        ("The Eiffel Tower!", ["eiffel  tower"], 1, 1),
        ("tower", ["the Eiffel Tower"], 0, 2 / 3),
        ("a b b", ["b b c"], 0, 4 / 5),  # words count as often as they occur; a is an article
        ("", [""], 1, 1),
        ("x", [""], 0, 0),
        ("the", [""], 1, 1),
        ("", ["A", "Vitamin A"], 0, 0),  # an answer of which nothing is left is none, as in SQuAD 2.0's script
        ("", ["the"], 1, 1),
        ("Paris", ["London", "in Paris"], 0, 2 / 3),
    ],
)
def test_squad_scores_by_hand(prediction: str, answers: list[str], em: float, f1: float) -> None:
    assert metrics.exact_match(prediction, answers) == em
    assert metrics.answer_f1(prediction, answers) == pytest.approx(f1)


@pytest.mark.parametrize(
    "right, total, low, high", [(0, 10, 0.0, 27.75), (10, 10, 72.25, 100.0), (50, 100, 40.38, 59.62)]
)
def test_wilson(right: int, total: int, low: float, high: float) -> None:
    assert metrics.wilson(right, total) == pytest.approx((low, high), abs=0.01)


def test_wilson_solves_its_equation() -> None:
    """The ends are where |share - p| is z standard errors of p."""
    z, n, share = 1.959964, 37, 12 / 37
    for end in metrics.wilson(12, n):
        p = end / 100
        assert abs(share - p) == pytest.approx(z * math.sqrt(p * (1 - p) / n))


def test_mean_and_sample_standard_deviation() -> None:
    assert metrics.mean_std([1.0, 3.0]) == pytest.approx({"mean": 2.0, "std": math.sqrt(2)})
    assert metrics.mean_std([5.0]) == {"mean": 5.0, "std": 0.0}


def test_rank_correlation() -> None:
    assert metrics.rank_correlation([1, 2, 3], [10, 30, 500]) == pytest.approx(1)
    assert metrics.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert metrics.rank_correlation([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(
        0.9486833
    )  # ties, by hand: 4.5/sqrt(4.5*5)
    assert math.isnan(metrics.rank_correlation([1, 1], [1, 2]))
    closeness = {"near": 0.8, "mid": 0.6, "far": 0.1}
    scores = {"near": [97.0, 95.0, 96.0], "mid": [81.0, 80.0, 96.5], "far": [60.0, 58.0, 61.0]}
    found = metrics.transfer_correlation(closeness, scores)
    assert found["low"] < found["rho"] <= found["high"] <= 1 and found["low"] >= 0.5


@pytest.mark.parametrize("name", TASKS)
def test_perfect_scores_100_and_shuffled_about_chance(name: str) -> None:
    task = TASKS[name]
    examples = task.synthetic("syn", 60 if name == "qa" else 300, 0, "train")
    answer = {"nli": lambda e: e.label, "qa": lambda e: e.texts[0]}.get(name, lambda e: list(e.tags))
    gold = [answer(example) for example in examples]
    assert task.score(examples, gold)[task.metric] == 100
    draw = random.Random(0)
    if name in ("ner", "pos"):
        words = [tag for tags in gold for tag in tags]
        draw.shuffle(words)
        shuffled = [[words.pop() for _ in tags] for tags in gold]
    else:
        shuffled = draw.sample(gold, len(gold))
    score = task.score(examples, shuffled)[task.metric]
    low, high = {"ner": (0, 12), "pos": (5, 25), "qa": (0, 20), "nli": (26, 41)}[name]
    assert low <= score <= high
    baseline = task.baselines(examples, task.synthetic("syn", 200, 0, "test"))["majority"][task.metric]
    assert baseline < 60


def test_baselines_by_hand() -> None:
    """The commonest label of train; the words that do best on train."""
    train = [Pair("a", "b", label) for label in [LABELS[1]] * 3 + [LABELS[0]]]
    test = [Pair("a", "b", label) for label in [LABELS[1], LABELS[0], LABELS[0], "-"]]
    third = {"accuracy": pytest.approx(100 / 3)}
    assert TASKS["nli"].baselines(train, test) == {"majority": third, "lexical": third}
    train.append(Pair("a", "never b", LABELS[2]))
    test.append(Pair("a", "never c", LABELS[2]))
    assert TASKS["nli"].baselines(train, test)["lexical"] == {"accuracy": 50.0}, (
        "of neutral and contradiction, one right"
    )
    asked = [Question(str(n), "?", f"x{n} yes z", (("yes", 3),)) for n in range(4)]
    assert TASKS["qa"].baselines(asked, [Question("t", "?", "q no z", (("no", 2),))]) == {
        "majority": {"f1": 100.0, "em": 100.0}
    }
    tagged = [sentence("a b c", "B-LOC O B-LOC"), sentence("a d", "B-LOC O")]
    found = TASKS["ner"].baselines(tagged, [sentence("a x", "B-LOC B-LOC")])
    assert found["majority"]["f1"] == 100 and found["lexical"]["f1"] == pytest.approx(200 / 3)

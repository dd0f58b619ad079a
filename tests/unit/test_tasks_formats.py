"""Task files: read as published, written back byte for byte, refused with file and line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlinterf_ds.errors import UserError
from mlinterf_ds.predict import _sentences
from mlinterf_ds.tasks import TASKS
from mlinterf_ds.tasks import ner as ner_module
from mlinterf_ds.tasks.sources import Sets, load, parse

CONLLU = """# newdoc
# sent_id = 1
1-2\tdel\t_\t_\t_\t_\t_\t_\t_\t_
1\tde\tde\tADP\t_\t_\t3\tcase\t_\t_
2\tel\tel\tDET\t_\t_\t3\tdet\t_\t_
2.1\tghost\t_\tNOUN\t_\t_\t_\t_\t_\t_
3\t10 000\t_\tNUM\t_\t_\t0\troot\t_\tSpaceAfter=No

# sent_id = 2
1\tYes\tyes\tINTJ\t_\t_\t0\troot\t_\t_

"""
HEADER = "language\tgold_label\tsentence1\tsentence2\n"
HYPOTHESIS = {"premise": "a", "hypothesis": "b", "label": "neutral"}
PAIR = {"sentence1": "a", "sentence2": "b", "gold_label": "neutral"}


def put(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def gold(task: str, example: Any) -> Any:
    """The prediction that is right."""
    if task == "nli":
        return example.label
    return example.texts[0] if task == "qa" else TASKS[task].gold([example])[0]


@pytest.mark.parametrize(
    "task, name, text",
    [
        ("ner", "f", "Ann\tB-PER\nSmith\tI-PER\n\nhi\tO\n\n"),
        ("ner", "f", "Ann\tB-PER\nSmith\tI-PER\n\n\nhi\tO\n"),  # no blank line at the end, two in between
        ("ner", "f", "Ann NNP B-NP B-PER\nran VBD B-VP O\n"),
        ("ner", "f", "-DOCSTART- -X- -X- O\n\nAnn NNP B-NP S-PER\nLee NNP I-NP B-ORG\nCo NNP I-NP E-ORG\n\n"),
        ("ner", "f", "\nAnn\tB-PER\r\nhi\tO\r\n\r\n"),
        ("ner", "f", "a\u2028b\tO\n#\tO\n"),  # a line separator inside a word; a word that looks like a comment
        ("ner", "f", "-DOCSTART- O\n\nAnn\tB-PER\nhi\tO"),  # no tab in the mark; no newline at the end
        ("ner", "f", "# id 7\tdomain=en\nkido _ _ B-PER\n# _ _ O\n\n# id 8\tdomain=en\nhi _ _ O\n"),  # MultiCoNER
        ("ner", "f", "#\thttp://a.b/c [2009]\n1\tKido\tB-PER\tO\n2\thi\tO\tO\n\n"),  # GermEval
        ("ner", "f", "# sent_id = 1\n# text = Kido hi\n1\tKido\tB-PER\t-\tann1\n2\thi\tO\t-\tann1\n"),  # Universal NER
        ("ner", "f", "0 Kido NNP B-PER\n1 hi UH O\n\n0 ho UH O\n1 ho UH O\n"),
        ("ner", "f.conllup", "# global.columns = ID FORM NER MISC\n1\tKido\tB-PER\t_\n2\thi\tO\t_\n"),
        ("ner", "f.conllup", "# global.columns = FORM NER\nKido\tB-PER\nhi\tO\n"),
        ("ner", "f", "Kido\tB-PER\n\tO\n"),  # an empty word, as GermEval has some
        ("ner", "f", "en:Kido\tB-PER\nen:\tO\n"),
        ("ner", "f", "王 B-PER\n小 M-PER\n明 E-PER\n在 O\n家 S-LOC\n"),
        ("ner", "f", "Kido\tB-O\nhi\tO\n"),  # a type that is called O
        ("pos", "f.conllu", CONLLU),
        ("pos", "f.conll", CONLLU),
        ("pos", "f.txt", "# sent_id = 1\nfois NOUN\n# SYM\n"),
        ("pos", "f.tsv", "# newdoc\n\n# sent_id = 1\nfois\tNOUN\n"),
        ("pos", "f.conllup", "# global.columns = ID FORM UPOS X:Y\n1\tfois\tNOUN\t_\n"),
        ("pos", "f.CONLLU", CONLLU + "# end\n"),
        ("pos", "f.txt", "10 000 NUM\nfois NOUN\n\noui INTJ\n"),
        ("nli", "f", "A cat.\tAn animal.\tentailment\nA cat.\tA dog.\tcontradiction\nx\ty\t-\n"),
        ("nli", "f", HEADER + "en\tneutral\tA.\tB.\n"),
        ("nli", "f", "A.\tB.\tneutral\r\nC.\tD.\tentailment\r\n"),
        ("nli", "f", "premise\thypo\tlabel\r\nA.\tB.\tneutral\r\n"),  # machine-translated training data of XNLI
        ("nli", "f", json.dumps(PAIR | {"language": "en", "k": 1}) + "\n"),
        ("nli", "f", json.dumps(HYPOTHESIS) + "\n" + json.dumps(HYPOTHESIS | {"label": "entailment"}) + "\n"),
        (
            "nli",
            "f",
            json.dumps({"sentence1": "一", "sentence2": "二", "label": "-"}, ensure_ascii=False) + "\n",
        ),  # OCNLI, JNLI
        ("nli", "f", json.dumps({"premise": "a", "hypothesis": "b", "gold_label": "neutral"}) + "\n"),  # KLUE
        ("ner", "f", "## klue-1\t<a:PS> b:c\n가\tB-PS\n \tO\n나\tO\n"),
        ("nli", "f", "[\n" + ",\n".join([json.dumps(HYPOTHESIS)] * 2) + "\n]\n"),
    ],
)
def test_files_come_back_byte_for_byte(task: str, name: str, text: str, tmp_path: Path) -> None:
    """A file written with its own labels has the same bytes."""
    path = put(tmp_path, name, text)
    examples = TASKS[task].read(path, "en")
    TASKS[task].write(examples, [gold(task, example) for example in examples], tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == path.read_bytes()
    if task == "pos" and "10 000" in text:
        assert "10 000" in examples[0].words and not {"ghost", "del"} & set(examples[0].words)


def test_conllu_predictions_replace_only_the_tag(tmp_path: Path) -> None:
    task = TASKS["pos"]
    examples = task.read(put(tmp_path, "f.conllu", CONLLU), "en")
    task.write(examples, [["X"] * len(s.words) for s in examples], tmp_path / "out.conllu")
    text = (tmp_path / "out.conllu").read_text()
    assert text.count("\tX\t") == 4 and text.count("# sent_id") == 2 and "2.1\tghost\t_\tNOUN" in text
    assert [s.words for s in task.read(tmp_path / "out.conllu", "en")] == [s.words for s in examples]


def test_a_mark_of_the_byte_order_where_files_were_joined(tmp_path: Path) -> None:
    text = "\ufeff-DOCSTART-\tO\n\nKido\tB-PER\n\n\ufeff-DOCSTART-\tO\n\n\ufeffbeku\tO\n"
    assert [s.words for s in TASKS["ner"].read(put(tmp_path, "f", text), "en")] == [("Kido",), ("beku",)]


def test_other_columns_that_hold_tags_are_noted(tmp_path: Path) -> None:
    """Chunks of CoNLL 2003, and outer entities where the last column has the inner ones."""
    (sentence,) = TASKS["ner"].read(put(tmp_path, "f.txt", "EU NNP B-NP B-ORG\nsays VBZ B-VP O\n"), "en")
    assert (
        sentence.tags == ("B-ORG", "O")
        and sentence.remark == "f.txt has tags in column 4, which are read, and in column 3"
    )


@pytest.mark.parametrize("encode", [lambda text: text.encode("utf-16"), lambda text: text.replace("\n", "\r").encode()])
def test_files_of_old_and_of_office_programs(encode: Callable[[str], bytes], tmp_path: Path) -> None:
    """UTF-16 with its byte-order mark, and lines that carriage returns alone end."""
    entities, pairs = "Kido\tB-PER\nhi\tO\n\nbeku\tO\n", "Premise\tHypothesis\tLabel\nA.\tB.\tneutral\n"
    for task, text in (("ner", entities), ("nli", pairs)):
        (tmp_path / "f").write_bytes(encode(text))
        examples, expected = (TASKS[task].read(path, "en") for path in (tmp_path / "f", put(tmp_path, "g", text)))
        assert [gold(task, example) for example in examples] == [gold(task, example) for example in expected]
        TASKS[task].write(examples, [gold(task, example) for example in examples], tmp_path / "out")
        assert (tmp_path / "out").read_text() == text


def test_predictions_replace_the_outer_entities_of_a_numbered_file(tmp_path: Path) -> None:
    task = TASKS["ner"]
    text = "1\tKido\tB-PER\tB-LOC\n2\thi\tO\tO\n"
    (sentence,) = task.read(put(tmp_path, "f.tsv", text), "en")
    assert (sentence.words, sentence.tags) == (("Kido", "hi"), ("B-PER", "O"))
    assert sentence.remark == "f.tsv has tags in column 3, which are read, and in column 4"
    task.write([sentence], [["B-ORG", "I-ORG"]], tmp_path / "out")
    assert (tmp_path / "out").read_text() == "1\tKido\tB-ORG\tB-LOC\n2\thi\tI-ORG\tO\n"


SCHEMES = {
    "IOB1": "I-PER I-PER B-PER O I-LOC I-ORG",
    "IOB2": "B-PER I-PER B-PER O B-LOC B-ORG",
    "IOBES": "B-PER E-PER S-PER O S-LOC S-ORG",
    "BILOU": "B-PER L-PER U-PER O U-LOC U-ORG",
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_means_the_same_and_is_recognised(scheme: str) -> None:
    from seqeval.metrics.sequence_labeling import get_entities

    tags = SCHEMES[scheme].split()
    assert ner_module.spans(tags) == [("PER", 0, 2), ("PER", 2, 3), ("LOC", 4, 5), ("ORG", 5, 6)]
    assert ner_module.in_scheme(tags, "IOB2") == SCHEMES["IOB2"].split()
    assert ner_module.scheme_of([tags]) == scheme
    assert ner_module.in_scheme(SCHEMES["IOB2"].split(), scheme) == tags
    if scheme != "BILOU":  # seqeval's default reading does not know U
        assert [(kind, first, last + 1) for kind, first, last in get_entities(tags)] == ner_module.spans(tags)


@pytest.mark.parametrize("prefix", ["en", "arz", "zh-yue", "zh-min-nan", "simple"])
def test_the_wiki_before_every_word_is_not_read(prefix: str, tmp_path: Path) -> None:
    (sentence,) = TASKS["ner"].read(put(tmp_path, "f", f"{prefix}:Ann\tB-PER\n{prefix}::\tO\n"), "en")
    assert sentence.words == ("Ann", ":")
    (sentence,) = TASKS["ner"].read(put(tmp_path, "g", f"{prefix}:Ann\tB-PER\nna\tO\n"), "en")
    assert sentence.words[0] == f"{prefix}:Ann", "half of the words are not most"


def test_pairs_of_one_language_and_no_label(tmp_path: Path) -> None:
    task = TASKS["nli"]
    text = HEADER + "sw\tneutral\tA.\tB.\nen\tcontradictory\tC.\tD.\n"
    (pair,) = task.read(put(tmp_path, "f.tsv", text), "en")
    assert (pair.premise, pair.hypothesis, pair.label) == ("C.", "D.", "contradiction")
    pairs = task.read(put(tmp_path, "g.tsv", "a\tb\t-\na\tb\tneutral\n"), "en")
    assert [task.labelled(p) for p in pairs] == [False, True]
    assert task.score(pairs, ["neutral", "neutral"]) == {"accuracy": 100.0}
    for text in (json.dumps(PAIR), "a\tb\tneutral"):  # a first line may be blank
        (pair,) = task.read(put(tmp_path, "f", f"\n{text}\n"), "en")
        assert (pair.premise, pair.hypothesis, pair.label) == ("a", "b", "neutral")


def test_predictions_do_not_show_the_gold_by_their_spelling(tmp_path: Path) -> None:
    task = TASKS["nli"]
    text = "premise\thypo\tlabel\nA.\tB.\tcontradictory\nC.\tD.\tneutral\n"
    task.write(task.read(put(tmp_path, "f.tsv", text), "sw"), ["contradiction"] * 2, tmp_path / "out.tsv")
    assert (tmp_path / "out.tsv").read_text() == text.replace("neutral", "contradictory")


def squad(context: str, *questions: dict) -> str:
    return json.dumps({"data": [{"paragraphs": [{"context": context, "qas": list(questions)}]}]}, indent=1)


def asked(name: str | int, *answers: tuple[str, int], **more) -> dict:
    return {"id": name, "question": "?", "answers": [{"text": t, "answer_start": s} for t, s in answers], **more}


ANN = asked("a", ("Ann", 0))


def test_questions_of_one_language(tmp_path: Path) -> None:
    text = squad("Ann ran.", *(asked(f"{name}-1", ("Ann", 0)) for name in ("swahili", "english", "finnish")))
    path = put(tmp_path, "f.json", text)
    assert [q.id for q in TASKS["qa"].read(path, "fi")] == ["finnish-1"]
    with pytest.raises(UserError, match="'fr'; its ids name english, finnish, swahili"):
        TASKS["qa"].read(path, "fr")
    alone = put(tmp_path, "g.json", squad("Ann ran.", asked("swahili-1", ("Ann", 0))))
    assert len(TASKS["qa"].read(alone, "swl")) == 1, "a file in one language may have any code"


def test_questions_are_read_by_name(tmp_path: Path) -> None:
    more = [asked("b", is_impossible=True), asked("c", ("", 0)), asked("a", ("ran", 4))]
    task = TASKS["qa"]
    questions = task.read(put(tmp_path, "f.json", squad("Ann ran.", ANN, *more)), "en")
    assert [q.texts for q in questions] == [["Ann"], [""], [""], ["ran"]]
    assert [task.labelled(q) for q in questions] == [True, True, False, True], "the answer of c is withheld"
    assert [q.id for q in questions] == ["a", "b", "c", "a#2"]
    assert task.labels(questions)[-1] == "none" and len(task.labels(questions[:1])) == 2
    task.write(questions, [q.texts[0] for q in questions], tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == {"a": "Ann", "b": "", "c": "", "a#2": "ran"}
    assert task.score(questions, ["Ann", "", "x", "ran"]) == {"f1": 100.0, "em": 100.0}


@pytest.mark.parametrize(
    "task, text, written",
    [
        ("ner", "# id\nAnn\nran\n\nhi\n", "# id\nAnn\tB-PER\nran\tB-PER\n\nhi\tB-PER\n"),
        ("ner", "Ann\tE-PER\nran\t?\n", "Ann\tS-PER\nran\tS-PER\n"),  # in the scheme of tags that are there
        ("ner", "1\tAnn\n2\tran\n3\tno\n", "1\tAnn\tB-PER\n2\tran\tB-PER\n3\tno\tB-PER\n"),
        ("pos", CONLLU.replace("ADP", "_").replace("INTJ", ""), None),
        ("nli", "A.\tB.\n", "A.\tB.\tneutral\n"),
        ("nli", "premise\thypothesis\nA.\tB.\n", "premise\thypothesis\tlabel\nA.\tB.\tneutral\n"),
        ("nli", "premise\thypothesis\r\nA.\tB.\r\n", "premise\thypothesis\tlabel\r\nA.\tB.\tneutral\r\n"),
        (
            "nli",
            '{"premise": "A.", "hypothesis": "B."}\n',
            '{"premise": "A.", "hypothesis": "B.", "label": "neutral"}\n',
        ),
        ("nli", "A.\tB.\tentailment\n", "A.\tB.\tneutral\n"),
    ],
)
def test_new_text_needs_no_answers(task: str, text: str, written: str | None, tmp_path: Path) -> None:
    new = TASKS[task].configured(unlabelled=True)
    examples = new.read(put(tmp_path, "f.conllu" if task == "pos" else "f", text), "en")
    label = {"ner": "B-PER", "pos": "X", "nli": "neutral"}[task]
    new.write(examples, [label if task == "nli" else [label] * len(e.words) for e in examples], tmp_path / "out")
    wanted = written or CONLLU.replace("ADP", "X").replace("INTJ", "X").replace("\tDET", "\tX").replace("\tNUM", "\tX")
    assert (tmp_path / "out").read_bytes().decode() == wanted
    with pytest.raises(UserError):
        TASKS["qa"].read(put(tmp_path, "g", squad("Ann ran.", {"id": "a", "question": "?"})), "en")
    (question,) = TASKS["qa"].configured(unlabelled=True).read(tmp_path / "g", "en")
    assert not TASKS["qa"].labelled(question)


def test_sentences_of_one_word_are_noted(tmp_path: Path) -> None:
    """Of a language without spaces `launch/predict.py --sentences` would give each sentence one tag."""
    thai, english = (
        _sentences(TASKS["ner"], put(tmp_path, "f", text))
        for text in ("\ufeffกรุงเทพเป็นเมืองหลวงของประเทศไทย\r\nใช่\r\nสวัสดีครับผมมาจากกรุงเทพ\r\n", "Ann ran .\nYes\n")
    )
    assert "2 of 3 lines are one word" in thai[0].remark and len(thai) == 3
    assert not english[0].remark and [s.words for s in english] == [("Ann", "ran", "."), ("Yes",)]


# --- mistakes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "task, text, words",
    [
        ("ner", "Ann\tB-PER\nhi O\n", ["line 2", "1 columns, expected 2"]),
        ("ner", "Ann NN B-PER\nhi O\n", ["line 2", "2 columns, expected 3"]),
        ("ner", "Ann\tB-PER\n\nhi\n", ["line 3", "1 columns, expected 2"]),
        ("ner", "hi O\nAnn B-PER O\n", ["line 2", "3 columns, expected 2"]),
        ("ner", "en:hi\tO\nen:ho\tO\nho\tO\n", ["line 3", "lacks the prefix 'en:'"]),
        ("ner", "a O\nb O\rc O\n", ["line 2", "carriage return"]),
        ("pos", CONLLU.replace("\tINTJ", "\r\tINTJ"), ["carriage return"]),
        ("ner", "hi\tO\n#hi\tX-LOC\n", ["line 2", "'X-LOC'"]),
        ("ner", "#hi\tX-LOC\nhi\tO\n", ["line 1", "'X-LOC'"]),
        ("ner", "hi\tO\n# hi\n", ["line 2", "1 columns, expected 2"]),
        ("ner", "1\tO\n2\tO\n3\tO\n", ["line 1", "numbers the words", "no other"]),
        ("ner", "1\ta\tO\n2\tb\tO\nx\tc\tO\n" + "1\ta\tO\n2\tb\tO\n\n" * 9, ["line 3", "'x'", "a number"]),
        ("ner", "".join(f"bc/cctv\tw{n}\tO\n" for n in range(20)), ["20 of 20 words are 'bc/cctv'", "first column"]),
        ("ner", "\tO\n" * 20, ["20 of 20 words are ''"]),
        ("ner", "# global.columns = ID FORM UPOS\n1\ta\tX\n", ["ID FORM UPOS", "a column named NER"]),
        (
            "pos",
            "".join(f"{n}\t_\t_\tX\t_\t_\t_\t_\t_\t_\n" for n in (1, 2, 3)),
            ["line 1", "'_'", "text was left out"],
        ),
        ("ner", "Ann\tB-PER\nhi\tX-LOC\n", ["line 2", "'X-LOC'", "expected O or B-"]),
        ("ner", " \n\n", ["empty"]),
        ("ner", "-DOCSTART- O\n", ["no words"]),
        ("pos", "1\tde\tde\tADP\t_\n", ["line 1", "5 columns, expected 10"]),
        ("pos", CONLLU.replace("INTJ", "INTERJ"), ["line 10", "'INTERJ'", "INTJ"]),
        ("pos", CONLLU.replace("3\t10", "4\t10"), ["line 7", "ID '4'", "expected 3"]),
        ("qa", "{", ["line 1", "not JSON"]),
        ("qa", '{"data": 3}', ["SQuAD"]),
        ("qa", squad("\u200b ", ANN), ["'a'", "its context is empty"]),
        ("qa", squad("Ann ran.", asked("a")), ["no answers", "is_impossible"]),
        ("qa", '{"data": []}', ["no questions"]),
        ("qa", squad("Ann ran.", ANN, {"id": "é"}), ["line 19: data[0].paragraphs[0].qas[1], id 'é'"]),
        ("qa", squad("Ann ran.", {"question": "?"}), ["data[0].paragraphs[0].qas[0]", "'id'"]),
        ("qa", '{"data": [{"paragraphs": [{"qas": []}]}]}', ["data[0].paragraphs[0]", "'context'"]),
        ("nli", json.dumps(PAIR | {"k": "\ud800"}), ["line 1", "surrogate"]),
        ("nli", "a\tb\tneutral\na\tneutral\n", ["line 2", "2 columns"]),
        ("nli", "a\tb\tmaybe\n", ["line 1", "'maybe'", "entailment"]),
        ("nli", "text_a\ttext_b\tlabel\na\tb\tneutral\n", ["line 1 (a header names", "'label'"]),
        ("nli", "PK\x03\x04", ["a ZIP archive or an office document and not text"]),
        ("nli", '{"sentence1": "a"}\n', ["line 1", "sentence2"]),
        ("nli", json.dumps([HYPOTHESIS, HYPOTHESIS | {"label": 3}]), ["item 2", "3", "--labels"]),
        ("nli", '[{"premise": "a"', ["not a JSON array"]),
        ("nli", HEADER + "sw\tneutral\tA.\tB.\n", ["no pairs in language 'en'", "has sw"]),
    ],
)
def test_mistakes_name_file_and_line(task: str, text: str, words: list[str], tmp_path: Path) -> None:
    path = put(tmp_path, "f.conllu" if task == "pos" else "f", text)
    with pytest.raises(UserError) as caught:
        TASKS[task].read(path, "en")
    for word in [str(path), *words]:
        assert word in str(caught.value), caught.value


def test_line_of_a_wrong_answer_and_of_bad_bytes(tmp_path: Path) -> None:
    for name in ("b", "a", 7, "é"):  # an id again, a number, and one that JSON escapes
        text = squad("Ann ran 7.", ANN, asked(name))
        line = 1 + text[: text.rindex(f'"id": {json.dumps(name)}')].count("\n")
        for spelt in (text, text.replace("\\u00e9", "é")):
            with pytest.raises(UserError, match=f"line {line}: question '{name}'"):
                TASKS["qa"].read(put(tmp_path, "f.json", spelt), "en")
    (tmp_path / "g").write_bytes(b"a\tO\nb\xff\tO\n")
    with pytest.raises(UserError, match="line 2: not UTF-8"):
        TASKS["ner"].read(tmp_path / "g", "en")
    with pytest.raises(UserError, match="cannot be read"):
        TASKS["ner"].read(tmp_path / "absent", "en")


# --- answers that are spelt otherwise, labels that have other names ---------------------------------------------------
@pytest.mark.parametrize(
    "answer, start, words",
    [
        ("The old harbour", 0, "The\u00a0old harbour"),  # a no-break space
        ("1907 and", 26, "1907  and"),  # two spaces, and counted as if there were one before
        ("caf\u00e9", 39, "cafe\u0301"),  # composed, in a context that is not
        ("c\u200bafe\u0301", 37, "cafe\u0301"),
        ("closed", 99, "closed"),  # elsewhere, but only once
        ("cafe", 37, ""),  # inside a letter
        ("in", 3, ""),  # several times, and never there
        ("Bob", 0, ""),
        ("\u200b", 0, ""),
    ],
)
def test_answers_are_found_as_the_model_reads_them(answer: str, start: int, words: str, tmp_path: Path) -> None:
    context = "The\u00a0old harbour closed in 1907  and in cafe\u0301 style, in short."
    path = put(tmp_path, "f.json", squad(context, asked("a", (answer, start)), asked("b", (answer, start), ("The", 0))))
    task = TASKS["qa"]
    first, second = task.read(path, "en")
    assert [text for text, _ in first.answers] == [words] * bool(words)
    assert all(context[start : start + len(text)] == text for text, start in first.answers)
    assert task.labelled(first) == bool(words) and task.labelled(second)
    assert (second.moved, second.lost) == (bool(words), int(not words))
    assert (task.unfit(first) is None) == bool(words) and task.unfit(second) is None


def test_answers_that_are_not_found_are_counted_by_id_or_refused(tmp_path: Path) -> None:
    blank = asked("q8", is_impossible=True) | {"question": "\u200b"}
    path = put(tmp_path, "f.json", squad("Ann ran.", ANN, asked("q7", ("Bob", 0)), blank))
    read = sets(f"en={path}", f"en={path}", f"en={path}", "qa")
    assert [len(read.examples[split]["en"]) for split in ("train", "dev", "test")] == [1, 1, 3]
    note = "train en: 2 of 3 questions cannot be used: they are left out (q7, q8; the first: answer 'Bob'"
    assert any(text.startswith(note) for text in read.notes), read.notes
    with pytest.raises(UserError, match=r"--train en=.*f.json: question 'q7': answer 'Bob' .* does not occur"):
        sets(f"en={path}", f"en={path}", f"en={path}", "qa", unfound_answers="error")


def test_labels_are_renamed(tmp_path: Path) -> None:
    names = {"PERSON": "PER", "MISC": "O", "0": "entailment", "N": "NOUN"}
    ner, pos, nli = (TASKS[name].configured(label_map=names) for name in ("ner", "pos", "nli"))
    text = "Ann\tB-PERSON\nLee\tI-PERSON\nx\tS-MISC\ny\tU-LOC\n"
    (sentence,) = ner.read(put(tmp_path, "f", text), "en")
    assert sentence.tags == ("B-PER", "I-PER", "O", "U-LOC") and ner.mapped == {"PERSON", "MISC"}
    assert pos.read(put(tmp_path, "g", "fois N\n"), "en")[0].tags == ("NOUN",)
    (pair,) = nli.read(put(tmp_path, "h", json.dumps(HYPOTHESIS | {"label": 0})), "en")
    assert pair.label == "entailment"
    nli.write([pair], ["entailment"], tmp_path / "out")
    assert json.loads((tmp_path / "out").read_text()) == HYPOTHESIS | {"label": 0}
    path = put(tmp_path, "i", "Ann\tB-PERSON\n\nhi\tO\n")
    with pytest.raises(UserError, match="finetune.labels renames PERSN, which no file has"):
        sets(f"en={path}", f"en={path}", f"en={path}", label_map={"PERSN": "PER"})


def test_entities_that_training_never_had_are_missed_or_not_scored(tmp_path: Path) -> None:
    path = put(tmp_path, "f", "Asha\tB-PER\nleo\tB-DATE\nna\tO\n")
    labels, guess = ["O", "B-PER", "I-PER"], [["B-PER", "B-PER", "O"]]
    scores = {}
    for rule in ("miss", "ignore"):
        task = TASKS["ner"].configured(unknown_labels=rule)
        examples, note = task.settle(task.read(path, "sw"), labels)
        assert note.startswith("1 words have tags that training never had (B-DATE 1)")
        scores[rule] = task.score(examples, guess)["f1"]
        assert task.counts(examples, guess) == [(1.0, 2.0, 2.0) if rule == "miss" else (1.0, 1.0, 1.0)]
    assert scores == {"miss": 50.0, "ignore": 100.0}


# --- LANG=FILE -------------------------------------------------------------------------------------------------------
def sets(train: str, dev: str, test: str, task: str = "ner", **settings: Any) -> Sets:
    options = {"train": parse([train], "train"), "dev": parse([dev], "dev"), "test": parse([test], "test")}
    counts = {"train": 40, "dev": 10, "test": 10}
    return load(TASKS[task].configured(**settings), options, synthetic=counts)


def test_a_split_keeps_groups_together_and_is_always_the_same(tmp_path: Path) -> None:
    path = put(tmp_path, "f.tsv", "".join(f"w{n % 20}\tO\n\n" for n in range(100)))
    first, again = (sets(f"en={path}", "en=split", "en=split") for _ in range(2))
    words = {split: {s.words for s in first.examples[split]["en"]} for split in ("train", "dev", "test")}
    assert [len(words[split]) for split in ("train", "dev", "test")] == [16, 2, 2]
    assert len(set.union(*words.values())) == 20
    assert sum(len(first.examples[split]["en"]) for split in words) == 100
    assert [s.first_line for s in again.examples["dev"]["en"]] == [s.first_line for s in first.examples["dev"]["en"]]


def test_a_limit_draws_from_the_whole_file(tmp_path: Path) -> None:
    """A file of three sources, one after the other: each has about its share, always the same, and more keep these."""
    words = [f"{source}{number}" for source in "abc" for number in range(100)]
    file = put(tmp_path, "train.txt", "".join(f"{word} NOUN\n\n" for word in words))
    options = {split: {"sw": str(file)} for split in ("train", "dev", "test")}

    def kept(limit: int | None) -> list[str]:
        found = load(TASKS["pos"].configured(), options, synthetic={}, limit=limit)
        notes = [note for note in found.notes if "at random" in note]
        expected = [f"{split} sw: {limit} of 300 examples are read, drawn at random" for split in options]
        assert notes == (expected if limit and limit < 300 else [])
        return [example.words[0] for example in found.examples["train"]["sw"]]

    some = kept(90)
    assert len(some) == 90 and some == sorted(some, key=words.index) == kept(90)
    # hypergeometric: 30 of each source, with a standard deviation of 3.7
    assert all(abs(sum(word.startswith(source) for word in some) - 30) < 4 * 3.7 for source in "abc")
    assert set(some) < set(kept(150)) and kept(300) == kept(None) == words


@pytest.mark.parametrize("task", TASKS)
def test_synthetic_sets_differ_by_split(task: str, tmp_path: Path) -> None:
    made = sets("syn=synthetic", "syn=synthetic", "syn-mid=synthetic", task)
    assert (
        len(made.examples["train"]["syn"]) == 40
        and len(made.examples["dev"]["syn"]) == len(made.examples["test"]["syn-mid"]) == 10
    )
    assert made.examples["train"]["syn"][:10] != made.examples["dev"]["syn"]
    path = tmp_path / f"out{TASKS[task].suffix(made.examples['dev']['syn'])}"
    if task in ("ner", "pos"):
        TASKS[task].write(made.examples["dev"]["syn"], [s.tags for s in made.examples["dev"]["syn"]], path)
        assert [s.words for s in TASKS[task].read(path, "syn")] == [s.words for s in made.examples["dev"]["syn"]]


@pytest.mark.parametrize(
    "train, dev, test, words",
    [
        ("en=", "en=split", "en=split", "expected LANG=FILE or LANG=synthetic, such as en=train.tsv"),
        ("en=split", "en=split", "en=split", "--train en=split: only --dev and --test can take a share of train"),
        ("EN=f", "en=split", "en=split", "LANG=FILE.*codes are lower-case: en"),
        ("en={}", "sw=split", "en=split", "give --train sw=FILE"),
        ("nosuch=synthetic", "nosuch=split", "nosuch=split", "unknown synthetic language 'nosuch'"),
    ],
)
def test_wrong_options(train: str, dev: str, test: str, words: str, tmp_path: Path) -> None:
    path = put(tmp_path, "f", "a\tO\n\nb\tO\n\nc\tO\n\nd\tO\n")
    with pytest.raises(UserError, match=words):
        sets(train.format(path), dev, test)


@pytest.mark.parametrize("option, words", [(["en=a", "en=b"], "given twice"), ([], "missing")])
def test_each_language_once(option: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse(option, "test")


def test_the_same_file_for_dev_and_test_is_noted(tmp_path: Path) -> None:
    path, other = (put(tmp_path, name, f"{name}\tO\n\nhi\tO\n") for name in "fg")
    options = [(f"en={other}", f"en={path}", f"en={path}"), (f"en={path}", f"en={path}", f"en={other}")]
    options.append(("syn=synthetic", "syn=synthetic", "syn=synthetic"))
    noted = [any("the same file" in note for note in sets(*option).notes) for option in options]
    assert noted == [True, False, False]


def test_withheld_labels_are_for_tests_only(tmp_path: Path) -> None:
    withheld = put(tmp_path, "f.json", squad("Ann ran.", asked("a", ("", 0))))
    labelled = put(tmp_path, "g.json", squad("Ann ran.", ANN))
    read = sets(f"en={labelled}", f"en={labelled}", f"en={withheld}", "qa")
    assert any("1 of 1 examples have no label" in note for note in read.notes)
    assert TASKS["qa"].score(read.examples["test"]["en"], ["Ann"]) == {}
    with pytest.raises(UserError, match="labels are withheld"):
        sets(f"en={labelled}", f"en={withheld}", f"en={labelled}", "qa")


# --- real files ------------------------------------------------------------------------------------------------------
def test_real_files_come_back_byte_for_byte(shared_data: Path, tmp_path: Path) -> None:
    tasks = shared_data / "tasks"
    files = [("ner", path) for path in sorted(tasks.glob("ner/panx/[hmst]*/dev.tsv"))]
    files += [("pos", path) for path in sorted(tasks.glob("pos/ud/*_[ump]*-ud-*.conllu"))]
    files += [("pos", path) for path in sorted(tasks.glob("pos/two_column/*/test.txt"))]
    files += [("nli", path) for path in sorted(tasks.glob("nli/xnli/*/dev.tsv"))]
    assert len(files) > 15
    for task, path in files:
        examples = TASKS[task].read(path, path.parent.name)
        TASKS[task].write(examples, [gold(task, example) for example in examples], tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == path.read_bytes(), path

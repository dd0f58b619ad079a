"""At least 10,000 damaged inputs of every parser: each is refused by name, or read as what it says; never a hang."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from mlinterf_ds.analysis.config import AnalyzeConfig
from mlinterf_ds.config import Section, fields, load_config
from mlinterf_ds.data.corpus import Corpus, manifest_digest
from mlinterf_ds.data.prepare.main import prepare
from mlinterf_ds.data.tokenizer import Tokenizer
from mlinterf_ds.errors import UserError
from mlinterf_ds.export.folder import Folder, stored_pieces
from mlinterf_ds.finetune.config import FinetuneConfig
from mlinterf_ds.gradients.measure import read_curves
from mlinterf_ds.pretrain.config import RunConfig
from mlinterf_ds.results.records import Records
from mlinterf_ds.results.runs import FineTunedRun, read_losses
from mlinterf_ds.study.config import StudyConfig
from mlinterf_ds.tasks import TASKS, Limits
from mlinterf_ds.tasks.ner import in_scheme
from tests.faults.fuzz import MUTATIONS, STRANGE, WOUNDS, cases, mutated, refuses, wounded
from tests.unit.test_corpus import SPLITS, some_lines, written
from tools.doctor import hosts as doctor_hosts

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
COUNTS = {
    "recipe bytes": 1000, "recipe values": 800, "set": 1000, "deepspeed": 900, "shards": 400, "manifest bytes": 500,
    "manifest values": 700, "tokenizer": 600, "ner": 700, "pos": 700, "qa": 700, "nli": 700, "tables": 500,
    "records": 300, "folders": 400, "hostfile": 300,
}  # fmt: skip


def test_there_are_10_000_cases() -> None:
    assert sum(COUNTS.values()) >= 10_000  # `cases` asserts that each test runs as many as it says


# --- configurations --------------------------------------------------------------------------------------------------
KINDS: list[tuple[type[Section], str, list[str]]] = [
    (RunConfig, "paper", []),
    (RunConfig, "trilingual_en_hi_mr", []),
    (FinetuneConfig, "finetune_qa", ["checkpoint=x"]),
    (AnalyzeConfig, "", ["checkpoint=x"]),
    (StudyConfig, "study_cpu", []),
    (StudyConfig, "study_real", []),
]


def toml(value: Any) -> str:
    """A value as TOML, as JSON where both agree."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, float):
        return {"inf": "inf", "-inf": "-inf", "nan": "nan"}.get(str(value), repr(value))
    return json.dumps(value)


def sound(config: Section) -> None:
    """What was accepted is a configuration: it validates again as itself, and has no number that isn't one."""
    dumped = config.model_dump()
    assert type(config).model_validate(dumped) == config
    json.dumps(dumped, allow_nan=False)


def key_names(kind: type[Section]) -> list[str]:
    return [part for key, _, _ in fields(kind) for part in key.split(".")]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipe") / "damaged.toml"


def test_recipes_with_damaged_bytes(recipe: Path) -> None:
    def case(drawn: Any) -> bool:
        (kind, name, extra), wounds = drawn
        recipe.write_bytes(wounded((RECIPES / f"{name or 'tiny'}.toml").read_bytes(), wounds))
        return refuses(lambda: sound(load_config(kind, [recipe], extra)), recipe, *key_names(kind))

    cases(COUNTS["recipe bytes"], st.tuples(st.sampled_from(KINDS), st.lists(WOUNDS, min_size=1, max_size=3)), case)


def tree_of(kind: type[Section], name: str, extra: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = load_config(kind, [RECIPES / f"{name}.toml"] if name else [], extra).model_dump()
    return json.loads(json.dumps(found))


def without_none(tree: Any) -> Any:
    """TOML has no null."""
    if isinstance(tree, dict):
        return {key: without_none(value) for key, value in tree.items() if value is not None}
    return [without_none(value) for value in tree if value is not None] if isinstance(tree, list) else tree


def test_recipes_with_damaged_values(recipe: Path) -> None:
    trees = [(kind, without_none(tree_of(kind, name, extra))) for kind, name, extra in KINDS]

    def case(drawn: Any) -> bool:
        (kind, tree), mutation = drawn
        changed = without_none(mutated(tree, *mutation))
        recipe.write_text(
            "".join(f"{json.dumps(key)} = {toml(value)}\n" for key, value in changed.items()), "utf-8", "replace"
        )
        return refuses(lambda: sound(load_config(kind, [recipe])), recipe, *key_names(kind))

    cases(COUNTS["recipe values"], st.tuples(st.sampled_from(trees), MUTATIONS), case)


def test_overrides() -> None:
    keys = [(kind, extra, key) for kind, _, extra in KINDS[2:5] + KINDS[:1] for key, _, _ in fields(kind)]

    def case(drawn: Any) -> bool:
        (kind, extra, key), value, form = drawn
        text = value if isinstance(value, str) else json.dumps(value)
        key = {"nested": f"{key}.x", "deep": key + ".x" * 3000, "empty": f"{key}..", "": key}[form]
        recipes = [RECIPES / "study_ci.toml"] if kind is StudyConfig else []

        def read() -> None:
            config = load_config(kind, recipes, [*extra, f"{key}={text}"])
            sound(config)
            found: Any = config
            for part in key.split("."):
                found = found[part] if isinstance(found, dict) else getattr(found, part)
            if isinstance(found, bool):
                assert found == (text.lower() in ("true", "1", "yes", "y", "on", "t")), (key, text, found)
            elif isinstance(found, int | float):
                assert float(found) == float(text), (key, text, found)
            elif isinstance(found, str):
                assert found == text or (text.lower() == "null" and found == "none"), (key, text, found)

        return refuses(read, f"--set {key}"[:100], key.split(".x")[0].rstrip("."))

    values = st.one_of(STRANGE, st.text(max_size=8), st.integers().map(str), st.floats().map(str))
    forms = st.sampled_from(["", "", "", "", "", "nested", "deep", "empty"])
    cases(COUNTS["set"], st.tuples(st.sampled_from(keys), values, forms), case)


def test_deepspeeds_json(tmp_path: Path) -> None:
    from mlinterf_ds.engine.precision import choose_precision, read_deepspeed_json, resolve

    trees = [json.loads(file.read_text()) for file in sorted(RECIPES.parents[1].glob("ds_configs/*.json"))]
    path, config = tmp_path / "ds.json", RunConfig()  # type: ignore[call-arg]

    def case(drawn: Any) -> bool:
        tree, mutation, wounds = drawn
        path.write_bytes(wounded(json.dumps(mutated(tree, *mutation)).encode(), wounds))

        def read() -> None:
            found = read_deepspeed_json(path)
            precision, _ = choose_precision("fp32", found)
            resolved = resolve(found, config.train, precision, 1)
            assert resolved["zero_optimization"]["stage"] in (0, 1, 2, 3)
            assert resolved["train_micro_batch_size_per_gpu"] == config.train.batch

        return refuses(read, path, "DeepSpeed's JSON", "zero_optimization")

    cases(COUNTS["deepspeed"], st.tuples(st.sampled_from(trees), MUTATIONS, st.lists(WOUNDS, max_size=1)), case)


# --- corpora ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A prepared corpus, and all that it says."""
    folder = tmp_path_factory.mktemp("corpus")
    files: dict[str, Any] = {
        code: [written(folder / code, some_lines(60, seed))] for seed, code in enumerate(("en", "sw"))
    }
    prepare(files, folder / "out", vocabulary_size=60, meta_split=True, workers=1)  # all splits hold text
    return folder / "out", said(folder / "out")


def said(folder: Path) -> Any:
    """Every number and token of a corpus that opens and verifies; ids and counts must fit each other."""
    found = Corpus.open(folder)
    found.verify()
    facts: dict[str, Any] = {"pieces": found.tokenizer.pieces}
    for language in found.languages:
        for split in SPLITS:
            counts = [getattr(found, name)(language, split) for name in ("sentences", "characters")]
            tokens = np.array(found.tokens(language, split)).tolist()
            assert max(tokens) < found.vocabulary_size and min(counts) >= 0
            facts[f"{language} {split}"] = counts, tokens
    return facts


def damage_and_read(folder: Path, name: str, data: bytes, truth: Any) -> bool:
    """Put a damaged file in; a corpus that is read all the same says what it said before."""
    path = folder / name
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        found = said(folder)
    except UserError as error:
        assert str(folder) in str(error), error
        return True
    finally:
        path.write_bytes(before)
    assert found == truth
    return False


def test_damaged_shards(corpus: tuple[Path, Any]) -> None:
    folder, truth = corpus
    names = sorted(path.name for path in folder.iterdir() if path.name not in ("manifest.json", "arguments.json"))

    def case(drawn: Any) -> bool:
        name, wounds = drawn
        return damage_and_read(folder, name, wounded((folder / name).read_bytes(), wounds), truth)

    cases(COUNTS["shards"], st.tuples(st.sampled_from(names), st.lists(WOUNDS, max_size=2)), case)


def test_manifests_with_damaged_bytes(corpus: tuple[Path, Any]) -> None:
    folder, truth = corpus
    data = (folder / "manifest.json").read_bytes()
    cases(
        COUNTS["manifest bytes"],
        WOUNDS,
        lambda wound: damage_and_read(folder, "manifest.json", wounded(data, [wound]), truth),
    )


def test_manifests_with_damaged_values(corpus: tuple[Path, Any]) -> None:
    """Also where someone made the digest fit again: then numbers may differ, but still fit the files; paths never leave."""
    folder, truth = corpus
    manifest = json.loads((folder / "manifest.json").read_text())

    def case(drawn: Any) -> bool:
        mutation, sealed = drawn
        changed = mutated(manifest, *mutation)
        if sealed:
            changed["digest"] = manifest_digest(changed)
        data = json.dumps(changed).encode()
        if not sealed:
            return damage_and_read(folder, "manifest.json", data, truth)
        (folder / "manifest.json").write_bytes(data)
        try:
            return refuses(lambda: said(folder), folder)
        finally:
            (folder / "manifest.json").write_text(json.dumps(manifest))

    cases(COUNTS["manifest values"], st.tuples(MUTATIONS, st.booleans()), case)


def test_damaged_tokenizers(corpus: tuple[Path, Any], tmp_path: Path) -> None:
    """Given by hand, a model has no digest: what loads has sound pieces, and encodes and decodes any text."""
    data, path = (corpus[0] / "tokenizer.model").read_bytes(), tmp_path / "m.model"

    def case(wounds: Any) -> bool:
        path.write_bytes(wounded(data, wounds))

        def read() -> None:
            found = Tokenizer(path)
            ids = found.encode("bako mitu é 漢\u0301 ")
            assert all(0 <= number < found.size for number in ids)
            found.decode(ids)
            "".join(found.pieces).encode()

        return refuses(read, path)

    cases(COUNTS["tokenizer"], st.lists(WOUNDS, max_size=2), case)


# --- task files ------------------------------------------------------------------------------------------------------
NER = [
    "Ann\tB-PER\nSmith\tI-PER\nran\tO\n\nin\tO\nRome\tB-LOC\n\n",
    "en:Ann\tB-PER\nen:ran\tO\n\nen:Rome\tI-LOC\nen:it\tO\n",
]
NER += [
    "-DOCSTART- -X- -X- O\n\nAnn NNP B-NP S-PER\nLee NNP I-NP B-ORG\nCo NNP I-NP E-ORG\n\n",
    "Ann B-PER\r\nran O\r\n\r\n",
]
CONLLU = "# text = x\n1-2\tdel\t_\t_\t_\t_\t_\t_\t_\t_\n1\tde\tde\tADP\t_\t_\t3\tcase\t_\t_\n2\tel\tel\tDET\t_\t_\t3\tdet\t_\t_\n"
CONLLU += "2.1\tghost\t_\tNOUN\t_\t_\t_\t_\t_\t_\n3\t10 000\t_\tNUM\t_\t_\t0\troot\t_\t_\n\n# a\n1\tYes\tyes\tINTJ\t_\t_\t0\troot\t_\t_\n\n"
POS = [
    (".conllu", CONLLU),
    (".txt", "10 000 NUM\nfois NOUN\n\noui INTJ\n"),
    (".txt", "an\tDET\nape\tNOUN\n\nran\tVERB\n"),
]
NLI = ["A man runs.\tHe moves.\tentailment\nIt is.\tIt isn't.\tcontradictory\nx\ty\t-\n"]
NLI += [
    "language\tgold_label\tpairID\tsentence1\tsentence2\nen\tneutral\t1\ta b\tc\nsw\tneutral\t2\tba\tko\nen\t-\t3\td\te\n"
]
NLI += [
    '{"sentence1": "a", "sentence2": "b", "gold_label": "neutral", "language": "en"}\n{"sentence1": "c\\u00e9", "sentence2": "d", "gold_label": "-"}\n'
]
SQUAD: dict[str, Any] = {
    "version": "1.1",
    "data": [
        {
            "title": "t",
            "paragraphs": [
                {
                    "context": "The cat sat on a mat. Il était là.",
                    "qas": [
                        {"id": "q1", "question": "Who sat?", "answers": [{"text": "The cat", "answer_start": 0}]},
                        {"id": "q2", "question": "Why?", "answers": [], "is_impossible": True},
                        {"id": 3, "question": "Où?", "answers": [{"text": "là", "answer_start": 31}, {"text": "", "answer_start": 0}]},
                    ],
                }
            ],
        }
    ],
}  # fmt: skip
LIMITS = Limits(max_length=32, stride=8, max_question=6, max_answer=5)


def read_task(task: Any, path: Path, tokenizer: Tokenizer) -> list[Any]:
    """The examples, which make rows of at most so many known pieces."""
    examples: list[Any] = task.read(path, "en")
    rows, _ = task.rows(examples, tokenizer, task.labels(examples), LIMITS)
    for row in rows:
        assert len(row.tokens) <= LIMITS.max_length and max(row.tokens) < tokenizer.size and min(row.tokens) >= 0
        assert len(row.positions) >= 1 and all(0 <= place < len(row.tokens) for place in row.positions)
    assert {row.example for row in rows} == set(range(len(examples)))
    return examples


def unmarked(data: bytes) -> str:
    """The text of a file without the byte-order marks at the beginnings of lines."""
    return data.decode().replace("\n\ufeff", "\n").removeprefix("\ufeff")


@pytest.mark.parametrize("name", ["ner", "pos"])
def test_damaged_tagged_files(name: str, corpus: tuple[Path, Any], tmp_path: Path) -> None:
    """What is read has a tag of the set for every line that is no comment, and is written back byte for byte."""
    task, tokenizer = TASKS[name], Tokenizer(corpus[0] / "tokenizer.model")
    originals = [(".tsv", text) for text in NER] if name == "ner" else POS

    def case(drawn: Any) -> bool:
        (suffix, text), wounds = drawn
        path, data = tmp_path / f"f{suffix}", wounded(text.encode(), wounds)
        path.write_bytes(data)

        def read() -> None:
            examples = read_task(task, path, tokenizer)
            text = unmarked(data)
            lines = [line for line in text.split("\n") if line.strip()]
            if suffix == ".conllu":
                lines = [line for line in lines if line[0] != "#" and re.fullmatch(r"[1-9]\d*", line.split("\t")[0])]
            else:
                lines = [line for line in lines if re.split(r"[ \t\r]", line.lstrip(" "))[0] != "-DOCSTART-"]
            sure = [line for line in lines if not re.match(r"#(\s|$)", line)]  # the others may be comments
            assert len(sure) <= sum(len(s.words) for s in examples) <= len(lines)
            tags = [s.tags for s in examples]
            if name == "ner":
                assert all(tag == "O" or tag[:2] in ("B-", "I-") for of in tags for tag in in_scheme(of, "IOB2"))
            out = tmp_path / "out"
            out.write_text("\n".join("\n".join(s.retagged(s.tags)) for s in examples), newline="")
            assert text == out.read_bytes().decode()

        return refuses(read, path)

    cases(COUNTS[name], st.tuples(st.sampled_from(originals), st.lists(WOUNDS, max_size=2)), case)


def test_damaged_questions(corpus: tuple[Path, Any], tmp_path: Path) -> None:
    """Every answer lies where it says."""
    task, tokenizer, path = TASKS["qa"], Tokenizer(corpus[0] / "tokenizer.model"), tmp_path / "f.json"

    def case(drawn: Any) -> bool:
        mutation, wounds = drawn
        tree = mutated(SQUAD, *mutation) if mutation else SQUAD
        path.write_bytes(
            wounded(json.dumps(tree, ensure_ascii=len(wounds) == 1).encode("utf-8", "surrogatepass"), wounds)
        )

        def read() -> None:
            examples = read_task(task, path, tokenizer)
            tree = json.loads(path.read_bytes())
            listed = [qa for article in tree["data"] for part in article["paragraphs"] for qa in part["qas"]]
            assert [example.question for example in examples] == [qa["question"] for qa in listed]
            assert len({example.id for example in examples}) == len(examples)
            for example in examples:
                for text, start in example.answers:
                    assert start >= 0 and example.context[start : start + len(text)] == text
            task.write(examples, [example.context[:3] for example in examples], tmp_path / "out.json")

        return refuses(read, path)

    cases(COUNTS["qa"], st.tuples(st.none() | MUTATIONS, st.lists(WOUNDS, max_size=2)), case)


def test_damaged_pairs(corpus: tuple[Path, Any], tmp_path: Path) -> None:
    """Labels of the set; the lines come back."""
    task, tokenizer, path = TASKS["nli"], Tokenizer(corpus[0] / "tokenizer.model"), tmp_path / "f.tsv"

    def case(drawn: Any) -> bool:
        text, wounds = drawn
        path.write_bytes(wounded(text.encode(), wounds))

        def read() -> None:
            examples = read_task(task, path, tokenizer)
            assert {pair.label for pair in examples} <= {"entailment", "neutral", "contradiction", "-"}
            lines = unmarked(path.read_bytes()).split("\n")
            assert all(pair.raw in lines for pair in examples)
            task.write(examples, [pair.label for pair in examples], tmp_path / "out.tsv")

        return refuses(read, path)

    cases(COUNTS["nli"], st.tuples(st.sampled_from(NLI), st.lists(WOUNDS, max_size=2)), case)


# --- other files -----------------------------------------------------------------------------------------------------
TABLES: list[tuple[str, Any, str]] = [
    (
        "train.csv",
        read_losses,
        "step,language,loss,lr,tokens\n1,en,5.25,0.001,640\n2,sw,5.5,0.002,1280\n3,en,4,0.002,1920\n",
    ),
    (
        "conflict.csv",
        read_curves,
        "step,scope,left,right,cosine\n0,model,en,en,0.9\n0,model,en,sw,-0.25\n0,layer 1,en,sw,0.1\n",
    ),
]


def test_damaged_tables(tmp_path: Path) -> None:
    def case(drawn: Any) -> bool:
        (name, read, text), wounds = drawn
        path = tmp_path / name
        path.write_bytes(wounded(text.encode(), wounds))

        def rows() -> None:
            found = read(path)
            fields = sum(len(of) for of in found.values())
            assert fields <= path.read_text("utf-8-sig").count("\n") * 3 + 3  # nothing is invented

        return refuses(rows, path)

    cases(COUNTS["tables"], st.tuples(st.sampled_from(TABLES), st.lists(WOUNDS, max_size=2)), case)


def test_damaged_records(tmp_path: Path) -> None:
    """A study's records are read back as they were, or with the types that tables and findings count on."""
    from tests.study_records import planted

    whole = planted()
    whole.scores, whole.models, whole.analyses = whole.scores[:2], whole.models[:2], whole.analyses[:2]
    tree, path = json.loads(json.dumps(asdict(whole))), tmp_path / "records.json"

    def case(drawn: Any) -> bool:
        mutation, wounds = drawn
        path.write_bytes(wounded(json.dumps(mutated(tree, *mutation) if mutation else tree).encode(), wounds))

        def read() -> None:
            found = Records.load(path)
            assert all(isinstance(score.score, float | int) for score in found.scores) and found.seeds is not None
            if mutation is None and not wounds:
                assert json.loads(json.dumps(asdict(found))) == tree

        return refuses(read, path)

    cases(COUNTS["records"], st.tuples(st.none() | MUTATIONS, st.lists(WOUNDS, max_size=1)), case)


SUMMARY = {
    "finished": True, "seeds": [0, 1], "task": "ner", "metric": "f1", "languages": ["en", "sw"], "variant": "adpt",
    "checkpoint": "runs/x", "pretraining_seed": 0, "examples": {"train": {"en": 10}}, "per_seed": {"en": [1.5, 2.0]},
    "data": {"test en": "file"}, "baseline": {"en": 1.0}, "metrics": {"en": {"f1": {"mean": 1.75}, "recall": {"mean": 2.5}}},
}  # fmt: skip
CONFIG = {
    "model_type": "mlinterf", "num_attention_heads": 4, "vocab_size": 6, "hidden_size": 8, "num_hidden_layers": 1,
    "intermediate_size": 8, "max_position_embeddings": 9, "variant": "adpt", "adapter_size": 2, "adapter_activation": "gelu",
}  # fmt: skip
VOCABULARY = {
    "model": {"vocab": {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "a": 5}},
    "added_tokens": [{"content": "<mask>", "id": 4}],
}


def test_damaged_folders(tmp_path: Path) -> None:
    """Fine-tunings' summaries and exported models."""
    import torch
    from safetensors.torch import save_file

    save_file({"embeddings.word.weight": torch.zeros(6, 2)}, tmp_path / "model.safetensors")
    readers: list[tuple[str, Any, Any]] = [
        ("summary.json", SUMMARY, lambda: FineTunedRun.open(str(tmp_path)).within),
        ("config.json", CONFIG, lambda: Folder(tmp_path).has("embeddings.word.weight")),
        ("tokenizer.json", VOCABULARY, lambda: stored_pieces(tmp_path)),
    ]

    for name, tree, read in readers:
        (tmp_path / name).write_text(json.dumps(tree))
        assert read(), "as it is, it is read"

    def case(drawn: Any) -> bool:
        number, mutation, wounds = drawn
        name, tree, read = readers[number]
        (tmp_path / name).write_bytes(wounded(json.dumps(mutated(tree, *mutation)).encode(), wounds))
        return refuses(read, tmp_path)

    cases(COUNTS["folders"], st.tuples(st.integers(0, 2), MUTATIONS, st.lists(WOUNDS, max_size=1)), case)


def test_damaged_hostfiles(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"

    def case(wounds: Any) -> bool:
        path.write_bytes(wounded(b"# hosts\nnode-1 slots=8\nnode-2 slots=8 # b\n\n10.0.0.3 slots=4\n", wounds))
        try:
            hosts = doctor_hosts.read_hostfile(path)
        except SystemExit as error:
            assert str(path) in str(error)
            return True
        assert all(host and not host.startswith("-") and " " not in host for host in hosts)
        return False

    cases(COUNTS["hostfile"], st.lists(WOUNDS, max_size=3), case)

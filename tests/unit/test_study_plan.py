"""A study's grid: what it expands to, that nothing is done twice, and what a job's hash depends on."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlinterf_ds.config import load_config
from mlinterf_ds.data.corpus import Corpus
from mlinterf_ds.errors import UserError
from mlinterf_ds.study import cost, plan, report, units
from mlinterf_ds.study.config import StudyConfig
from mlinterf_ds.study.corpora import Corpora
from mlinterf_ds.study.jobs import Job, Unit
from mlinterf_ds.study.main import main

ROOT = Path(__file__).resolve().parents[2]
ZERO1 = str(ROOT / "ds_configs" / "zero1.json")


def expanded(
    *recipes: str, settings: list[str] | None = None, deepspeed: str = ZERO1, output: str = "nowhere"
) -> list[Job]:
    config = load_config(StudyConfig, [*recipes], settings or [])
    return plan.expand(config, Corpora(config, Path(output)), deepspeed)


@pytest.fixture(scope="module")
def jobs() -> list[Job]:
    return expanded("study_cpu")


@pytest.fixture(scope="module")
def full() -> list[Job]:
    return expanded("study_cpu", "study_cpu_full")


def test_the_cpu_study_has_every_variant_and_analysis(jobs: list[Job]) -> None:
    pairs: dict[str, set[str]] = {}
    for job in jobs:
        if job.kind == "pretrain" and job.model.kind == "pair" and not job.model.control:
            pairs.setdefault(job.model.set, set()).add(job.model.variant)
    assert pairs["close"] == {"joint", "ffn", "attn", "adpt", "share_adpt", "meta_adpt"}
    assert pairs["mid"] < pairs["far"] < pairs["close"] and pairs.keys() == {"close", "mid", "far"}
    assert {job.model.seed for job in jobs if job.kind == "pretrain"} == {0, 1, 2, 3, 4, 5}
    tasks = {u.facts["task"] for j in jobs if j.kind == "finetune" for u in j.units}
    assert tasks == {"ner", "pos"}
    analyses = {u.facts["analysis"] for j in jobs if j.kind == "analyze" for u in j.units}
    assert analyses == {"conflict", "prune", "interference", "conflict-training"}


def test_departures_are_those_of_the_studys_models() -> None:
    def said(*settings: str, variants: str = "joint,adpt,meta_adpt") -> str:
        config = load_config(StudyConfig, ["study_ci"], [f"variants={variants}"])
        more = {"settings": [*config.settings, *settings], "departures": ["text is small"]}
        config = config.model_copy(update=more)
        return "; ".join(report.departures(config))

    assert said().startswith("the Transformer is pre-norm") and said().endswith(
        "; a token of a packed row sees its own document alone, and its position is counted from there; the meta step's "
        "validation loss reads training text that the step itself does not read; text is small"
    )
    plain = said("data.boundaries=none", variants="joint,adpt")
    assert plain.endswith("text is small") and "token" not in plain and "meta" not in plain
    reused = said("meta.order=simultaneous", "meta.reuse=true", "meta.text=held_out", "data.positions=row")
    assert "from one point" in reused and "train the shared parameters too" in reused
    assert "all languages" in said("data.mixed=true") and "all languages" not in reused
    assert "reads" not in reused and "counted" not in reused
    config = load_config(StudyConfig, ["study_ci"])
    (task, *_), words = config.tasks, "the mean of its pieces"
    changed = task.model_copy(update={"settings": [*task.settings, "finetune.word=mean"]})
    assert words in "; ".join(report.departures(config.model_copy(update={"tasks": [changed]})))
    assert words not in said()


def test_what_the_analyses_of_all_models_are_given(jobs: list[Job]) -> None:
    last = jobs[-1]
    by_name = {unit.name: dict(word.split("=", 1) for word in unit.arguments if "=" in word) for unit in last.units}
    inputs = by_name["interference.all"]
    mono, joint = (inputs[f"interference.{kind}"].split(",") for kind in ("mono", "joint"))
    assert len(mono) == 4 * 6 and len(joint) == 3 * 6 and len(inputs["interference.larger"].split(",")) == 6
    assert len(inputs["interference.tasks"].split(",")) == sum(len(j.units) for j in last.needs if j.kind == "finetune")
    curves = by_name["conflict-training.all"]["conflict.runs"].split(",")
    assert [name.rpartition("/")[2] for name in curves] == ["joint.close.seed0", "joint.far.seed0"]
    folders = {f"{{output}}/{job.folder}/{unit.name}" for job in last.needs for unit in job.units}
    assert folders.issuperset([*mono, *joint, *curves])


def test_shared_work_is_done_once_and_in_order(jobs: list[Job]) -> None:
    assert len({j.name for j in jobs}) == len({j.digest for j in jobs}) == len(jobs)
    mono = [j.model.set for j in jobs if j.kind == "pretrain" and j.model.variant == "mono" and j.model.seed == 0]
    assert sorted(mono) == ["syn", "syn-close", "syn-far", "syn-far@500", "syn-mid"]
    seen: set[str] = set()
    for job in jobs:
        assert {need.name for need in job.needs} <= seen
        seen.add(job.name)


def test_what_is_fine_tuned_and_tested(jobs: list[Job]) -> None:
    def units(name: str) -> dict[str, Unit]:
        return {u.name.split(".")[0]: u for j in jobs if j.name == f"finetune.{name}" for u in j.units}

    def tested(unit: Unit) -> list[str]:
        return [b for a, b in zip(unit.arguments, unit.arguments[1:], strict=False) if a == "--test"]

    joint = units("joint.far.seed1")
    assert set(joint) == {"ner-syn", "ner-syn-far", "pos-syn", "pos-syn-far"}
    assert tested(joint["ner-syn"]) == ["syn=synthetic", "syn-far=synthetic"] and tested(joint["ner-syn-far"]) == [
        "syn-far=synthetic"
    ]
    assert "finetune.seeds=1,1001" in joint["ner-syn"].arguments
    floor = units("mono.syn.seed0")["pos-syn"]  # a model that never saw the other languages
    assert len(tested(floor)) == 5 and "finetune.unseen=syn" in floor.arguments
    assert {"pos-syn-freeze", "pos-syn-far-freeze"} <= set(units("adpt.far.seed0"))
    assert "pos-syn-freeze" not in units("share_adpt.close.seed0")
    assert set(units("joint.far-tri.seed0")) == set(joint)  # the third language is tested on, not trained on


def test_a_share_of_train_is_tested_or_all_of_it_where_another_language_was_trained_on(tmp_path: Path) -> None:
    recipe = tmp_path / "shares.toml"
    for language in ("syn", "syn-far"):
        (tmp_path / language).write_text(language)
    files = f'syn = "{tmp_path}/syn"\nsyn-far = "{tmp_path}/syn-far"'
    shares = 'syn = "split"\nsyn-far = "split"'
    pair = '[[sets]]\nname = "far"\nlanguages = "syn,syn-far"\nvariants = ["joint"]\n'
    recipe.write_text(f'{pair}[[tasks]]\ntask = "qa"\n[tasks.train]\n{files}\n[tasks.test]\n{shares}\n')
    joint = next(job for job in expanded(str(recipe)) if job.name == "finetune.joint.far.seed0")
    tested = {
        unit.facts["train"]: [b for a, b in zip(unit.arguments, unit.arguments[1:], strict=False) if a == "--test"]
        for unit in joint.units
    }
    assert tested == {"syn": ["syn=split", f"syn-far={tmp_path}/syn-far"], "syn-far": ["syn-far=split"]}


def test_a_language_with_a_limit_of_its_own(tmp_path: Path) -> None:
    recipe = tmp_path / "limits.toml"
    pair = '[[sets]]\nname = "far"\nlanguages = "syn,syn-far"\nvariants = ["joint"]\n'
    recipe.write_text(f'{pair}[[tasks]]\ntask = "pos"\nsettings = ["finetune.limit=50"]\nlimits = {{ syn-far = 70 }}\n')
    read: dict[tuple[str, str], str] = {}
    for job in expanded(str(recipe)):
        for unit in job.units if job.kind == "finetune" else ():
            limits = [word for word in unit.arguments if word.startswith("finetune.limit=")]
            read[job.model.variant, unit.facts["train"]] = limits[-1]  # the last setting of a key counts
    small, large = "finetune.limit=50", "finetune.limit=70"
    assert read == {
        ("mono", "syn"): small, ("mono", "syn-far"): large, ("joint", "syn"): small, ("joint", "syn-far"): large
    }  # fmt: skip


def test_plain_adapters_with_the_rows_of_a_meta_step() -> None:
    jobs = {job.name: job for job in expanded("study_treatment") if job.kind == "pretrain"}
    rows, plain, batch = (jobs[f"pretrain.adpt{control}.small.seed7"] for control in ("-rows", "", "-batch"))
    assert set(rows.units[0].arguments) - set(batch.units[0].arguments) == {"data.meta_rows=16"}
    assert {"train.batch=32", "data.meta_rows=16"} <= set(rows.units[0].arguments)
    assert rows.units[0].facts["steps"] == plain.units[0].facts["steps"] and rows.model.limits == plain.model.limits
    assert rows.units[0].facts["tokens"] == 2 * plain.units[0].facts["tokens"]
    meta = (
        jobs["pretrain.meta_adpt.far.seed0"].units[0].facts
    )  # trains on as many rows (meta.reuse) as in the validation loss
    assert (
        meta["tokens"] == rows.units[0].facts["tokens"] and meta["step_tokens"] == plain.units[0].facts["step_tokens"]
    )


@pytest.mark.parametrize(
    "setting, words", [("meta.every=2", r"meta\.every=1 \(now 2\)"), ("data.mixed=false", r"\(now False\)")]
)
def test_the_control_of_the_same_rows_refuses_steps_that_train_less_on_them(
    setting: str, words: str, tmp_path: Path
) -> None:
    text = (ROOT / "launch/recipes/study_treatment.toml").read_text()
    (tmp_path / "study.toml").write_text(text.replace('"data.mixed=true"', f'"data.mixed=true", "{setting}"'))
    with pytest.raises(UserError, match=rf"controls\.rows .*{words}"):
        expanded(str(tmp_path / "study.toml"))


def test_controls(full: list[Job]) -> None:
    jobs = {j.name: j for j in full if j.kind == "pretrain"}
    direct, compute = jobs["pretrain.meta_adpt-direct.far.seed4"], jobs["pretrain.adpt-compute.far.seed4"]
    assert "meta.terms=direct" in direct.units[0].arguments
    plain = jobs["pretrain.adpt.far.seed4"].units[0].facts
    assert compute.units[0].facts["steps"] == 2 * plain["steps"] and compute.model.variant == "adpt"
    text = [job for name, job in jobs.items() if name.startswith("pretrain.mono-text.") and name.endswith("seed4")]
    assert {job.model.languages for job in text} == {("syn",), ("syn-close",), ("syn-mid",), ("syn-far",)}
    assert {job.units[0].facts["steps"] for job in text} == {plain["steps"] // 2}


def test_validation_rows_of_a_split_of_their_own(tmp_path: Path) -> None:
    """The control trains on the corpus of the other models, which the study prepares with that split; else there is none."""
    text = (ROOT / "launch/recipes/study_algorithm1.toml").read_text()
    (tmp_path / "study.toml").write_text(text.replace("10000", "400").replace("1500", "100").replace("5000", "300"))
    config = load_config(StudyConfig, [str(tmp_path / "study.toml")])
    corpora = Corpora(config, tmp_path)
    jobs = {job.name: job.units[0].arguments for job in plan.expand(config, corpora, ZERO1) if job.kind == "pretrain"}
    control, meta, adapters = (
        dict(word.split("=", 1) for word in jobs[f"pretrain.{row}.small.seed4"] if "=" in word)
        for row in ("meta_adpt-held_out", "meta_adpt", "adpt")
    )
    assert control == meta | {"meta.text": "held_out"} and meta["meta.order"] == "phi_first"
    assert meta == adapters | {"variant": "meta_adpt"}
    corpora.make()
    prepared = Corpus.open(control["corpus"])
    assert prepared.sentences("syn-mid", "train") == 100
    assert all(prepared.sentences(code, "meta") > 0 for code in ("syn", "syn-mid"))
    without = Corpora(load_config(StudyConfig, [str(tmp_path / "study.toml")], ["controls.held_out=false"]), tmp_path)
    assert without.root != corpora.root
    without.make()
    assert not Corpus.open(without.of({})[0]).sentences("syn", "meta")


NULL = """
seeds = [0, 1]
variants = ["joint", "meta_adpt"]
[corpus]
sentences = 400
vocabulary = 300
[[sets]]
name = "pair"
languages = "syn,syn-far"
[[sets]]
name = "null"
kind = "null"
languages = "syn,syn-b"
[[tasks]]
task = "ner"
recipes = ["finetune_tiny"]
[[analyses]]
analysis = "interference"
"""


def test_a_null_control_is_a_joint_model_of_two_halves_and_a_model_of_each(tmp_path: Path) -> None:
    """With a corpus and a comparison of its own; the half is no language of the study, and has no tasks."""
    (tmp_path / "null.toml").write_text(NULL)
    config = load_config(StudyConfig, [str(tmp_path / "null.toml")])
    corpora = Corpora(config, tmp_path)
    assert config.languages == ["syn", "syn-far"]
    grid = plan.expand(config, corpora, ZERO1)
    control = [job for job in grid if job.model.kind == "null"]
    names = {"joint.null", "mono.syn-in-null", "mono.syn-b-in-null"}
    assert {job.model.name.rpartition(".")[0] for job in control if job.kind == "pretrain"} == names
    tuned = {(u.facts["train"], job.model.variant) for job in control if job.kind == "finetune" for u in job.units}
    assert tuned == {("syn", "joint"), ("syn", "mono")}
    tests = [word for job in control for unit in job.units for word in unit.arguments if word.startswith("syn-b=")]
    assert not tests
    folders = {word for job in control for unit in job.units for word in unit.arguments if word.startswith("corpus=")}
    assert folders == {f"corpus={corpora.root / 'halves+syn-b'}"}
    by_name = {unit.name: dict(word.split("=", 1) for word in unit.arguments if "=" in word) for unit in grid[-1].units}
    inputs = by_name["interference-null.null"]
    assert len(inputs["interference.mono"].split(",")) == 4 and len(inputs["interference.joint"].split(",")) == 2
    assert len(inputs["interference.tasks"].split(",")) == 4 and "interference.larger" not in inputs
    assert "null" not in by_name["interference.all"]["interference.joint"]
    alone = config.model_copy(update={"sets": config.sets[1:]})
    last = plan.expand(alone, Corpora(alone, tmp_path), ZERO1)[-1]
    assert [unit.name for unit in last.units] == ["interference-null.null"]
    corpora.make()
    halves = Corpus.open(corpora.root / "halves+syn-b")
    assert halves.languages == ["syn", "syn-b"]
    whole = Corpus.open(corpora.root / "all")
    assert halves.tokenizer.content == whole.tokenizer.content
    sizes = [sum(c.sentences(code, s) for s in ("train", "valid", "test")) for c, code in
             ((halves, "syn"), (halves, "syn-b"), (whole, "syn"))]  # fmt: skip
    assert sizes[0] + sizes[1] == sizes[2]


def test_null_controls_of_several_languages_have_an_analysis_each() -> None:
    """Each compares the models of its own halves, on their own corpus; other languages than the source of transfer can be split."""
    jobs = expanded("study_null")
    units = jobs[-1].units
    assert len(jobs) == 91 and len(units) == 10 and {unit.facts["analysis"] for unit in units} == {"interference-null"}
    for unit in units:
        language, half = unit.facts["languages"]
        inputs = dict(word.split("=", 1) for word in unit.arguments if "=" in word)
        joint, mono = (inputs[f"interference.{key}"].split(",") for key in ("joint", "mono"))
        assert unit.facts["set"] == language and half == f"{language}-b" and "interference.tasks" not in inputs
        assert len(joint) == 3 and all(f"joint.{language}.seed" in folder for folder in joint)
        assert len(mono) == 6 and all(f"-in-{language}.seed" in folder for folder in mono)
    corpora = {word for job in jobs for unit in job.units for word in unit.arguments if word.startswith("corpus=")}
    assert len(corpora) == 10


def test_a_monolingual_model_with_a_vocabulary_of_its_own(tmp_path: Path) -> None:
    """A corpus of its language alone, with the text and the splits of the study's corpus and as many pieces of its own."""
    (tmp_path / "null.toml").write_text(NULL)
    config = load_config(StudyConfig, [str(tmp_path / "null.toml")], ["controls.vocabulary=true"])
    config = config.model_copy(update={"sets": config.sets[:1]})
    corpora = Corpora(config, tmp_path)
    grid = [job for job in plan.expand(config, corpora, ZERO1) if job.model.control == "vocabulary"]
    corpus_of = {job.model.set: [word for unit in job.units for word in unit.arguments if word.startswith("corpus=")]
                 for job in grid if job.kind == "pretrain"}  # fmt: skip
    assert corpus_of == {code: [f"corpus={corpora.root / f'own+{code}'}"] for code in ("syn", "syn-far")}
    assert {job.model.set for job in grid if job.kind == "finetune"} == corpus_of.keys()
    corpora.make()
    shared = Corpus.open(corpora.root / "all")
    for code in corpus_of:
        own = Corpus.open(corpora.root / f"own+{code}")
        assert own.languages == [code] and own.vocabulary_size == shared.vocabulary_size
        assert own.tokenizer.content != shared.tokenizer.content
        for split in ("train", "valid"):
            texts = [c.tokenizer.decode(c.tokens(code, split).tolist()) for c in (own, shared)]
            assert texts[0] == texts[1]
    with pytest.raises(UserError, match="controls.vocabulary: give corpus.text"):
        prepared = config.model_copy(update={"corpus": config.corpus.model_copy(update={"folder": str(tmp_path)})})
        Corpora(prepared, tmp_path)


def test_the_larger_study_finds_the_smaller_ones_models(jobs: list[Job], full: list[Job]) -> None:
    larger = {j.digest for j in full}
    assert {j.digest for j in jobs if j.kind == "pretrain"} <= larger


# --- hashes ------------------------------------------------------------------------------------------------------------
CI = ["study_ci"]


def digests(**changes: Any) -> list[str]:
    return [job.digest for job in expanded("study_ci", **changes)]


def test_places_and_names_don_t_change_a_job() -> None:
    same = ["name=other", "tracking.enabled=false", "parallel=1", "margin=2"]
    assert digests() == digests(settings=same, output="elsewhere")


def test_what_decides_a_result_changes_its_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digests()
    json_file = tmp_path / "zero.json"
    json_file.write_text(json.dumps(json.loads(Path(ZERO1).read_text()) | {"wall_clock_breakdown": True}))
    for changed in (digests(deepspeed=str(json_file)), digests(settings=["ranks=2"])):
        assert not set(before) & set(changed)
    monkeypatch.setattr(plan, "code_hash", lambda kind: "edited" if kind == "finetune" else "as it was")
    edited = digests()
    monkeypatch.setattr(plan, "code_hash", lambda kind: "as it was")
    kinds = [job.kind for job in expanded("study_ci")]
    assert [a != b for a, b in zip(digests(), edited, strict=True)] == [kind == "finetune" for kind in kinds]


def test_a_changed_data_file_changes_the_fine_tunings_that_read_it(tmp_path: Path) -> None:
    recipe, file = tmp_path / "real.toml", tmp_path / "en.txt"
    recipe.write_text(
        f'[[sets]]\nname = "p"\nlanguages = "en,sw"\n[corpus]\ntext = {{ en = "{file}", sw = "{file}" }}\n'
        f'[[tasks]]\ntask = "pos"\ntrain = {{ en = "{file}" }}\ntest = {{ en = "{file}", sw = "{file}" }}\n'
    )

    def found() -> dict[str, str]:
        units._data_hash.cache_clear()
        return {job.name: job.digest for job in expanded(str(recipe))}

    file.write_text("one")
    first = found()
    file.write_text("two")
    second = found()
    assert {name for name in first if first[name] != second[name]} == {
        name for name in first if name.startswith("finetune")
    }
    file.unlink()
    with pytest.raises(UserError, match=r"en\.txt.*No such file"):
        found()


def test_a_changed_text_is_another_corpus(tmp_path: Path) -> None:
    """A corpus that was prepared from other text is not taken for this one's, whatever the file is called."""
    recipe, file = tmp_path / "real.toml", tmp_path / "en.txt"
    text = f'[corpus]\ntext = {{ en = "{file}", sw = "{file}" }}\n[[sets]]\nname = "p"\nlanguages = "en,sw"\n'
    recipe.write_text(text)
    roots = []
    for words in ("one", "two", "one"):
        file.write_text(words)
        roots.append(Corpora(load_config(StudyConfig, [str(recipe)]), tmp_path).root)
    assert roots[0] == roots[2] != roots[1]


def test_a_changed_initial_model_changes_its_jobs(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    recipe, found = tmp_path / "init.toml", []
    recipe.write_text(f'settings = ["init={tmp_path}/model", "train.steps=20"]')
    for words in ("one", "two"):
        (tmp_path / "model" / "weights").write_text(words)
        units._folder_hash.cache_clear()
        found.append({job.digest for job in expanded("study_ci", str(recipe))})
    assert not found[0] & found[1]
    recipe.write_text(f'settings = ["init={tmp_path}/gone"]')
    with pytest.raises(UserError, match=r"init=.*gone: no such folder"):
        expanded("study_ci", str(recipe))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small package with a recipe, what it imports, and what it does not."""
    folder = tmp_path / "package"
    files = {
        "__init__": "",
        "main": "from package import shown, model\ndef run():\n    from package.room.late import f",
        "model": "from typing import TYPE_CHECKING\nimport package.room.base\nif TYPE_CHECKING:\n    import package.typed",
        "room/__init__": "",
        "room/base": "",
        "room/late": "import package.main",
        "shown": "import package.other",
        "other": "",
        "typed": "",
    }
    for name, text in files.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(plan, "PACKAGE", folder)
    monkeypatch.setattr(plan, "COMMANDS", {"pretrain": "package.main"})
    monkeypatch.setattr(plan, "IRRELEVANT", ("shown.py",))
    return folder


def test_a_recipes_code_is_what_it_imports(package: Path) -> None:
    def names(**options: Any) -> set[str]:
        return {str(path.relative_to(package)) for path in plan.imported_files("package.main", **options)}

    everything = {"__init__.py", "main.py", "model.py", "room/__init__.py", "room/base.py", "room/late.py", "shown.py"}
    assert names() == everything | {"other.py"}
    assert names(without=("shown.py",)) == everything - {"shown.py"}
    assert names(without=("room", "shown.py")) == {"__init__.py", "main.py", "model.py"}


@pytest.mark.parametrize(
    "file, text, same",
    [
        ("room/base.py", "# a comment\n", True),
        ("room/base.py", "x = 1\n", False),
        ("room/late.py", "import  package.main  # again", True),
        ("room/late.py", "", False),
        ("shown.py", "x = 1\n", True),
        ("typed.py", "x = 1\n", True),
    ],
)
def test_the_code_hash_changes_with_what_decides_numbers(package: Path, file: str, text: str, same: bool) -> None:
    before = plan.code_hash.__wrapped__("pretrain")
    (package / file).write_text(text)
    plan._tree.cache_clear()
    assert (plan.code_hash.__wrapped__("pretrain") == before) is same


def test_every_recipe_is_hashed_with_what_its_numbers_come_from() -> None:
    inputs = {"pretrain": "meta/bilevel.py", "finetune": "tasks/metrics.py", "analyze": "analysis/interference.py"}
    for kind, name in inputs.items():
        files = plan.imported_files(plan.COMMANDS[kind], plan.IRRELEVANT)
        assert {plan.PACKAGE / name, plan.PACKAGE / "model/encoder.py"} <= set(files)
    for name in plan.IRRELEVANT:
        assert (plan.PACKAGE / name).exists()


def test_distances_are_measured_where_the_recipe_gives_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"en": ["ab ab"], "fr": ["ab ac"], "hi": ["xyz"]}
    monkeypatch.setattr("mlinterf_ds.study.report.Corpus.open", lambda folder: None)
    monkeypatch.setattr("mlinterf_ds.analysis.distance.sentences", lambda corpus, code, most: texts[code])
    prepared: Any = SimpleNamespace(of=lambda limits: ("folder", "hash"))
    recipe, pair = tmp_path / "real.toml", '[[sets]]\nname = "{0}"\nlanguages = "en,{0}"\n'
    text = f'[corpus]\nfolder = "prepared"\n{pair.format("fr")}{pair.format("hi")}'
    recipe.write_text(text)
    found, what = report.distances(load_config(StudyConfig, [str(recipe)]), prepared)
    assert 0 < found["fr"] < found["hi"] == pytest.approx(1) and "characters" in what
    recipe.write_text(f"{text}distance = 3\n")
    found, what = report.distances(load_config(StudyConfig, [str(recipe)]), prepared)
    assert found == {"hi": 3.0} and "recipe" in what


# --- mistakes ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text, words",
    [
        ("", "sets is empty"),
        ('[[sets]]\nname = "a"\nlanguages = "en"', "name two or more"),
        ('[[sets]]\nname = "a"\nlanguages = "en,sw,hi"', "kind pair: it takes 2 languages, not 3"),
        ('[[sets]]\nname = "a"\nlanguages = "en,sw"\n[[sets]]\nname = "a"\nlanguages = "en,hi"', "'a' is there twice"),
        ('[[sets]]\nname = "a"\nlanguages = "en,sw"\n[[sets]]\nname = "b"\nlanguages = "sw,hi"', "same source language"),
        ('[[sets]]\nname = "a"\nlanguages = "en,sw"\nlimits = { sw = 9 }', "kind low"),
        ('[[sets]]\nname = "a"\nlanguages = "en,sw"\n[[sets]]\nname = "b"\nlanguages = "en,sw"', "two pairs of en and sw"),
        ('variants = ["mono"]\n[[sets]]\nname = "a"\nlanguages = "en,sw"', "leave mono out"),
        ('[[sets]]\nname = "a"\nlanguages = "en,sw"\n[[tasks]]\ntask = "ner"\nlr = 3', "unknown key"),
        ('[[sets]]\nname = "a"\nlanguages = "en,sw"\n[[tasks]]\ntask = "pos"\nlimits = { ws = 9 }', "pos: limits: ws: no language of the sets"),
        ('settings = ["train.stepz=3"]\n[[sets]]\nname = "a"\nlanguages = "syn,syn-far"', "did you mean train.steps"),
        ('settings = ["train.lr=fast"]\n[[sets]]\nname = "a"\nlanguages = "syn,syn-far"', r"in the study's settings: train.lr='fast' \(train.lr=fast\)"),
        ('settings = ["parallel.tensor=2"]\n[[sets]]\nname = "a"\nlanguages = "syn,syn-far"', "ranks=1 is not a multiple of parallel.tensor=2"),
        ('[[sets]]\nname = "a"\nlanguages = "syn,syn-far"\n[[analyses]]\nanalysis = "interference"\nsettings = ["interference.rowz=8"]', r"in the study's \[\[analyses\]\] interference: settings: .*interference.rowz"),
        ('[corpus]\nfolder = "corpora/x"\n[[sets]]\nname = "a"\nkind = "null"\nlanguages = "en,en-b"', "can't be subsampled"),
        ('[[sets]]\nname = "a"\nlanguages = "en,sw"\n[[sets]]\nname = "b"\nkind = "null"\nlanguages = "en,sw"', "sw is half of a language"),
        ('[corpus]\nfolder = "corpora/x"\n[[sets]]\nname = "a"\nkind = "low"\nlanguages = "en,sw"\nlimits = { sw = 9 }', "can't be subsampled"),
        ('[[sets]]\nname = "a"\nlanguages = "en,sw"\n[[analyses]]\nanalysis = "prune"\n[[analyses]]\nanalysis = "prune"', "analyses: 'prune' is there twice"),
        ('[[sets]]\nname = "a"\nkind = "low"\nlanguages = "en,sw"\nlimits = { sw = 9 }\n[[sets]]\nname = "b"\nkind = "low"\nlanguages = "en,sw"\nlimits = { sw = 8 }', "limited to 9 and to 8"),
        ('[corpus]\ntext = { en = "en.txt" }\n[[sets]]\nname = "a"\nlanguages = "en,sw"', "corpus.text has no sw"),
    ],
)  # fmt: skip
def test_a_recipes_mistake_is_one_clear_sentence(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(text)
    with pytest.raises(UserError, match=words):
        expanded(str(tmp_path / "study.toml"))


def test_deepspeeds_json_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(UserError, match=r"--deepspeed_config .*ds\.json: not JSON"):
        expanded("study_ci", deepspeed=str(tmp_path / "ds.json"))


# --- cost --------------------------------------------------------------------------------------------------------------
def test_cost_follows_what_finished_jobs_took(tmp_path: Path) -> None:
    """Finished jobs that took twice the estimate double that of others of their kind."""
    jobs = expanded("study_ci")
    default = cost.Calibration.of(jobs, tmp_path)
    assert default.measured == 0
    first, tuned = jobs[0], jobs[1]
    for job in (first, tuned):
        one = {u.name: default.seconds(replace(job, units=(u,))) - default.startup for u in job.units}
        units = {name: {"state": "finished", "seconds": 2 * value} for name, value in one.items()}
        (tmp_path / job.folder).mkdir(parents=True)
        (tmp_path / job.folder / "done.json").write_text(json.dumps({"units": units, "startup": 7.0, "seconds": 11.0}))
    found = cost.Calibration.of(jobs, tmp_path)
    assert (found.measured, found.startup) == (2, 7.0)
    for job in jobs:
        assert found.seconds(job) - 7 == pytest.approx(2 * (default.seconds(job) - default.startup))
    text = cost.show(jobs, tmp_path, slots=2)
    assert "8 launches, 8 to do" in text and "by 2 finished jobs" in text


def test_cost_grows_with_the_work(tmp_path: Path) -> None:
    """More steps, a wider model, the meta step and more epochs cost more; the start-up is paid once a job."""
    found = cost.Calibration()

    def seconds(name: str, *settings: str) -> float:
        (tmp_path / "more.toml").write_text(f'settings = {json.dumps(settings)}\nvariants = ["joint", "meta_adpt"]\n')
        jobs = expanded("study_ci", str(tmp_path / "more.toml"))
        (job,) = [job for job in jobs if job.name == name]
        return found.seconds(job) - found.startup

    plain, meta = (seconds(f"pretrain.{variant}.close.seed0", "train.steps=40") for variant in ("joint", "meta_adpt"))
    double = seconds("pretrain.joint.close.seed0", "train.steps=80")
    wide = seconds("pretrain.joint.close.seed0", "train.steps=40", "model.width=640")
    assert double - cost.UNIT == pytest.approx(2 * (plain - cost.UNIT))
    assert wide > plain and meta > 3.5 * plain


def test_cost_on_a_gpu(tmp_path: Path) -> None:
    """A step of the recipe `paper_8heads` with 512 rows takes some 80 ms on an H100 (RESULTS.md: 85 ms of 12 heads)."""
    (tmp_path / "paper.toml").write_text('recipes = ["paper_8heads"]\nsettings = ["train.steps=1000"]\n')
    jobs = expanded("study_ci", str(tmp_path / "paper.toml"))
    (job,) = [job for job in jobs if job.name == "pretrain.joint.close.seed0"]
    found = cost.Calibration(cost.GPU)
    assert 60 < found.seconds(job) - found.startup < 100
    assert "left, GPU-minutes" in cost.show([job], tmp_path, slots=1, rates=cost.GPU)
    assert " hours with 1 at once" in cost.show([job], tmp_path, slots=1)  # on a core


def test_cost_counts_the_trainings_of_a_search(tmp_path: Path) -> None:
    """Three rates and two seeds are four trainings: the first seed tries every rate."""

    def steps(*settings: str) -> float:
        (tmp_path / "search.toml").write_text(
            f'[[tasks]]\ntask = "pos"\nrecipes = ["finetune_tiny"]\nsettings = {json.dumps(settings)}\n'
        )
        jobs = expanded("study_ci", str(tmp_path / "search.toml"))
        return next(job for job in jobs if job.kind == "finetune").units[0].facts["steps"]

    assert steps("finetune.lr=1e-3,2e-3,3e-3") == 3 * steps("finetune.lr=1e-3")


def test_a_dry_run_shows_jobs_cost_and_power_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--recipe", "study_cpu", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "283 launches, 283 to do" in said and "default figures: no job has finished yet" in said
    assert main(["--recipe", "study_cpu", "--dry-run", "--gpus", "8"]) == 0
    assert "with 8 at once (by default figures)" in (on_gpus := capsys.readouterr().out) and "GPU-minutes" in on_gpus
    with pytest.raises(UserError, match=r"pilot: meta_is_bes: no such claim; the claims are .*meta_adpt_best_within"):
        main(["--recipe", "study_cpu", "--dry-run", "--set", "pilot.meta_is_bes=1"])
    with pytest.raises(UserError, match=r"--gpus 1: .*ranks=2"):
        main(["--recipe", "study_cpu", "--dry-run", "--gpus", "1", "--set", "ranks=2"])
    with pytest.raises(UserError, match="--gpus 8 .*add --dry-run"):
        main(["--recipe", "study_cpu", "--gpus", "8"])
    jobs = [line.split()[0] for line in said.splitlines() if re.match(r"  (pretrain|finetune|analyze)\.", line)]
    assert len(jobs) == len(set(jobs)) == 283 and "finetune.meta_adpt.close.seed5" in jobs
    assert "with 6 seeds an effect of this size is told from none" in said and "meta_adpt_best_within" in said
    assert not list(tmp_path.iterdir())

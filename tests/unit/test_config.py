"""The run configuration: precedence, refusals, every shipped recipe and DeepSpeed JSON."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mlinterf_ds.config import REMOVED, decisive, describe, differences, fields, load_config, with_present_keys
from mlinterf_ds.engine.optimizer import LossScale
from mlinterf_ds.engine.precision import bf16_arithmetic, choose_precision, read_deepspeed_json, resolve
from mlinterf_ds.errors import UserError
from mlinterf_ds.finetune.config import FinetuneConfig
from mlinterf_ds.pretrain.config import RunConfig, _is_of, load_run, read_arguments

ROOT = Path(__file__).resolve().parents[2]
RECIPES = [
    p
    for p in sorted((ROOT / "launch" / "recipes").glob("*.toml"))
    if not p.stem.startswith(("finetune", "study", "ad"))
]
JSONS = sorted((ROOT / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(recipe: Path) -> None:
    assert load_run([recipe]) == load_run([recipe.stem])


@pytest.mark.parametrize("recipe", ["add_language", "adapt_many"])
def test_a_recipe_for_a_model_that_exists_asks_for_it(recipe: str) -> None:
    with pytest.raises(
        UserError, match="train.freeze=shared trains language modules alone on a model that init= names"
    ):
        load_run([recipe])


@pytest.mark.parametrize("path", JSONS, ids=lambda path: path.stem)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_shipped_json_resolves(path: Path, precision: str) -> None:
    resolved = resolve(read_deepspeed_json(path), load_run(["tiny"]).train, precision, 2)
    assert "auto" not in str(resolved)
    assert resolved["train_micro_batch_size_per_gpu"] == 16
    assert [name for name in ("fp16", "bf16") if name in resolved] == [precision] * (precision != "fp32")


def test_set_beats_recipe_beats_default(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text("[train]\nsteps = 7\nbatch = 6\n")
    config = load_run([recipe], ["train.batch=5", "train.batch=4", "languages=en,sw", "model.adapter=none"])
    assert (config.train.steps, config.train.batch, config.train.seed) == (7, 4, 0)
    assert config.languages == ["en", "sw"] and config.model.adapter_width == 32


@pytest.mark.parametrize(
    "settings, words",
    [
        (["train.step=3"], ["train.step", "'3'", "train.steps"]),
        (["steps=3"], ["steps", "train.steps"]),
        (["train.steps=many"], ["train.steps", "many", "integer"]),
        (["train.steps"], ["section.key=value"]),
        (["variant=adapter"], ["variant", "adapter", "adpt"]),
        (["model.heads=3"], ["model.heads=3", "model.width", "head_width"]),
        (["model.heads=6", "model.width=96", "parallel.tensor=4"], ["model.heads=6", "parallel.tensor=4"]),
        (["languages=en,en"], ["en", "twice"]),
        (["languages=EN"], ["languages", "EN"]),
        (["variant=mono", "languages=en,sw"], ["mono", "joint"]),
        (["variant=meta_adpt", "languages=en"], ["meta_adpt", "mono"]),
        (["variant=meta_adpt", "data.meta_rows=4"], ["data.meta_rows=4", "meta_adpt"]),
        (["variant=adpt", "train.batch=8", "data.meta_rows=8"], ["data.meta_rows=8", "train.batch=8"]),
        (["variant=adpt", "data.meta_rows=4", "data.only=en"], ["data.meta_rows", "data.only"]),
        (["variant=adpt", "data.meta_rows=4", "languages=en"], ["data.meta_rows", "two languages"]),
        (["meta.radius=0"], ["meta.radius", "greater than 0"]),
        (["meta.beta=0"], ["meta.beta", "greater than 0"]),
        (["treatment=pcgrad", "variant=joint"], ["data.mixed=true"]),
        (["resume=x", "init=y"], ["resume", "init"]),
        (["data.synthetic_limit=syn"], ["syn: expected LANG=N", "data.synthetic_limit=syn"]),
        (["data.synthetic_limit=syn=0"], ["data.synthetic_limit.syn", "greater than or equal to 1"]),
        (["languages=zh-Hant"], ["languages.0='zh-Hant'", "must be lower-case: 'zh-hant'"]),
    ],
)
def test_refusals_name_key_value_and_remedy(settings: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_run([], settings)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_recipes_as_editors_save_them(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('name = "größer"\n', encoding=encoding)
    assert load_run([tmp_path / "own.toml"]).name == "größer"


def test_none_is_a_word_where_a_key_holds_text() -> None:
    words = ["tracking.tags.note=none", "name=null", "train.spike=none", "treatment=None", "model.adapter=none"]
    config = load_run([], words)
    assert (config.tracking.tags, config.name) == ({"note": "none"}, "null")
    assert (config.train.spike, config.treatment, config.model.adapter) == (None, "none", None)


def test_help_shows_what_a_bare_start_has(capsys) -> None:
    with pytest.raises(SystemExit):
        read_arguments(["--help"])
    shown, bare = capsys.readouterr().out, read_arguments([])[0]
    for section, keys in bare.model_dump().items():
        for name, value in keys.items() if isinstance(keys, dict) else ():
            assert f"  {section}.{name}={value} " in shown


def test_limits_by_language() -> None:
    found = load_run([], ["data.synthetic_limit=syn=2000, syn-mid=50"])
    assert found.data.synthetic_limit == {"syn": 2000, "syn-mid": 50} and load_run().data.synthetic_limit == {}


def test_bad_recipes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothere.*tiny"):
        load_run(["nothere"])
    (tmp_path / "bad.toml").write_text("[train\n")
    with pytest.raises(UserError, match=r"bad\.toml.*TOML"):
        load_run([tmp_path / "bad.toml"])
    (tmp_path / "key.toml").write_text("[train]\nspeed = 1\n")
    with pytest.raises(UserError, match=r"train\.speed.*key\.toml"):
        load_run([tmp_path / "key.toml"])


def test_refusals_say_where_a_key_was_set(tmp_path: Path) -> None:
    """Also one whose table is empty, and one that a section's own validator refuses, whatever a recipe set beside it."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[model]\nlayers = 2\n[odd]\n")
    with pytest.raises(UserError, match=rf"odd=\{{\}} \({recipe}\): unknown key"):
        load_run([recipe])
    recipe.write_text("[model]\nlayers = 2\n")
    with pytest.raises(UserError, match=r"^model\.heads: expected numbers below .* \(--set model\.heads=9{30}\)$"):
        load_run([recipe], [f"model.heads={'9' * 30}"])


def test_a_removed_key_is_refused_with_its_reason_and_ignored_in_a_checkpoints_record() -> None:
    key = "finetune.eval_batch"
    with pytest.raises(UserError, match=rf"{key} \(--set {key}=8\) is no longer a key: {REMOVED[key]}"):
        load_config(FinetuneConfig, [], [f"{key}=8"])
    saved = {"finetune": {"epochs": 3}}
    assert with_present_keys({"finetune": {"epochs": 3, "eval_batch": 8}}) == saved


def test_a_key_that_came_later_has_the_meaning_of_before_in_an_older_record() -> None:
    """A checkpoint of before boundaries and `meta.text` was trained without the one and on the meta split."""
    older = load_run().model_dump()
    for section, key in (("data", "boundaries"), ("data", "positions"), ("meta", "text")):
        del older[section][key]
    config = with_present_keys(older)
    assert (config["data"]["boundaries"], config["data"]["positions"], config["meta"]["text"]) == (
        "none", "row", "held_out",
    )  # fmt: skip
    now = decisive(RunConfig, load_run().model_dump())
    assert differences(now, decisive(RunConfig, config)) == [
        "data.boundaries is document, was none", "data.positions is boundary, was row", "meta.text is train, was held_out",
    ]  # fmt: skip


def test_what_a_resumed_run_may_change() -> None:
    before = load_run()
    free = ["train.steps=9", "parallel.timeout=1", "output=x", "tracking.tags.a=b", "conflict.every=5", "restarts=1"]
    now = load_run([], [*free, "train.lr=1", "data.synthetic_limit=syn=5"])
    kept, then = (decisive(RunConfig, config.model_dump()) for config in (now, before))
    assert differences(kept, then) == ["data.synthetic_limit.syn is 5, was None", "train.lr is 1.0, was 0.001"]
    assert "train.steps" in decisive(RunConfig, now.model_dump(), ("address",)), "it decides numbers"


def test_help_lists_every_key_with_a_meaning() -> None:
    text = describe(RunConfig)
    for key, _, meaning in fields(RunConfig):
        assert f"{key}=" in text and len(meaning) > 10, key


def test_contradictions_between_json_and_run_are_errors(tmp_path: Path) -> None:
    config = load_run(["tiny"])
    for key, value in [("train_batch_size", 999), ("gradient_clipping", 1.0)]:
        with pytest.raises(UserError, match=f"{key}.*train."):
            resolve({key: value}, config.train, "fp32", 1)
    with pytest.raises(UserError, match="batch=32.*3 data-parallel"):
        resolve({}, config.train, "fp32", 3)
    with pytest.raises(UserError, match="micro_batch=5"):
        resolve({}, load_run(["tiny"], ["train.micro_batch=5"]).train, "fp32", 1)
    with pytest.raises(UserError, match="bf16.*fp16"):
        choose_precision("bf16", {"fp16": {"enabled": True}})
    with pytest.raises(UserError, match="both"):
        choose_precision("auto", {"fp16": {"enabled": True}, "bf16": {"enabled": True}})
    with pytest.raises(UserError, match="optimizer"):
        (tmp_path / "o.json").write_text('{"optimizer": {"type": "Adam"}}')
        read_deepspeed_json(tmp_path / "o.json")
    with pytest.raises(UserError, match="not JSON"):
        (tmp_path / "j.json").write_text("{")
        read_deepspeed_json(tmp_path / "j.json")
    with pytest.raises(UserError, match="ds_configs"):
        read_deepspeed_json(tmp_path / "none.json")
    for key, value in [("initial_scale_power", '"x"'), ("loss_scale_window", "0"), ("loss_scale", "true")]:
        (tmp_path / "f.json").write_text(f'{{"fp16": {{"{key}": {value}}}}}')
        with pytest.raises(UserError, match=rf"f\.json: fp16\.{key}=.*expected a number"):
            read_deepspeed_json(tmp_path / "f.json")
    (tmp_path / "f.json").write_text('{"fp16": {"loss_scale": "auto", "initial_scale_power": 8}}')
    assert LossScale(True, read_deepspeed_json(tmp_path / "f.json")["fp16"]).value == 256
    with pytest.raises(UserError, match="no such file"):
        load_run(["x" * 300])


def test_a_precision_the_device_lacks_is_refused() -> None:
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cpu" or get_accelerator().is_fp16_supported():
        pytest.skip("this device computes in fp16")
    with pytest.raises(UserError, match="fp16.*no fp16 arithmetic"):
        choose_precision("fp16", {})
    assert choose_precision("auto", {})[0] in ("bf16", "fp32")


def test_bf16_is_chosen_where_the_processor_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where it is emulated, as oneDNN does on each processor with AVX-512; the oracle is the kernel's list of flags."""
    from deepspeed.accelerator import get_accelerator

    flags = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()
    if get_accelerator().device_name() != "cpu" or "avx2" not in flags:
        pytest.skip("not a processor of this kind under Linux")
    assert bf16_arithmetic() == bool(flags & {"avx512_bf16", "amx_bf16"})
    has = torch.cpu.get_capabilities() | {"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}
    for more, expected in [({}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16")]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda more=more: has | more)
        assert choose_precision("auto", {})[0] == expected


def test_why_a_perplexity_rises_depends_on_what_is_trained() -> None:
    from mlinterf_ds.pretrain.report import why_risen

    def why(only: list[str] | None, freeze: str) -> str:
        config: Any = SimpleNamespace(
            data=SimpleNamespace(only=only), train=SimpleNamespace(freeze=freeze), init="runs/en-sw"
        )
        return why_risen("en", config)

    assert why(None, "none") == why(["en", "yo"], "none") == "its corpus is being overfitted"
    assert "data.only=yo" in why(["yo"], "shared") and "new pieces" in why(["yo"], "shared")
    assert "the model of init=runs/en-sw" in why(["yo"], "shared") and "overfitted" not in why(["yo"], "shared")
    assert "shared parameters move away" in why(["yo"], "none") and "train.freeze=shared" in why(["yo"], "none")


def test_true_and_false_beside_auto(tmp_path: Path) -> None:
    recipe = tmp_path / "fast.toml"
    recipe.write_text("[model]\ncompile = false\n[train]\ngraphs = true\n", "utf-8")
    config = load_run([recipe], [])
    assert config.model.compile is False and config.train.graphs is True
    assert RunConfig.model_validate(config.model_dump()) == config
    with pytest.raises(UserError, match=r"model\.compile"):
        load_run([], ["model.compile=perhaps"])


def test_a_path_whose_bytes_are_no_text_is_named_by_its_key() -> None:
    """As a terminal hands over `output=a\xff`: a checkpoint could not keep it."""
    with pytest.raises(UserError, match=r"^output: 'a.udcffb' is no text that UTF-8 can hold"):
        load_run([], ["output=a\udcffb"])


def test_a_run_goes_on_from_its_own_checkpoints_whatever_it_started_from() -> None:
    own = "runs/a/checkpoints/step-00000003"
    assert _is_of("auto", "runs/a") and _is_of(own, "runs/a") and _is_of(own, "runs/../runs/a/")
    assert not _is_of(own, "runs/b") and not _is_of(own, None) and not _is_of("", "runs/a")


@pytest.mark.parametrize("step, finished", [(4, True), (2, False)])
def test_a_run_that_goes_on_is_not_finished(step: int, finished: bool, tmp_path: Path) -> None:
    """Its summary may be of an earlier end, at fewer steps; programs that watch it read this field."""
    from mlinterf_ds.pretrain.report import Records

    config = load_config(RunConfig, ["tiny"], ["train.steps=4", "tracking.enabled=false"])
    (tmp_path / "summary.json").write_text('{"finished": true, "steps": 2}')
    session: Any = SimpleNamespace(first=True, output=tmp_path)
    corpus: Any = SimpleNamespace(manifest_hash="hash", folder=tmp_path)
    Records(config, session).open(("en",), corpus, None, step)
    assert json.loads((tmp_path / "summary.json").read_text()) == {"finished": finished, "steps": 2}

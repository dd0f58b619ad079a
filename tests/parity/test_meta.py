"""The meta step against exact double backward in float64, at every layout, and what it must leave alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity import bodies, meta_bodies
from tests.ranks import pool

VARIANTS = ["meta_adpt", "meta_ffn", "meta_attn"]


@pytest.mark.parametrize("lookahead", ["sgd", "adam"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_mixed_product_in_float64(variant: str, lookahead: str) -> None:
    """The difference quotient is the derivative: error under 1e-6 at a small fixed radius."""
    settings = [f"variant={variant}", f"model.position_kind={'rotary' if variant == 'meta_attn' else 'learned'}"]
    (error,) = pool(1).run(meta_bodies.local_mixed_products, settings, lookahead, 1e-5)
    assert error < 1e-6


RATE = ["train.lr=0.003"]
BATCH = ["data.sequence_length=32", "train.batch=16"]  # 16 bits: round-off averages over the batch
PRODUCTS = [([f"variant={v}"], lookahead, "central", 0.999) for v in VARIANTS for lookahead in ("sgd", "adam")]
PRODUCTS += [
    (
        ["variant=meta_adpt", f"train.precision={precision}", f"meta.difference={difference}", *BATCH],
        "sgd",
        difference,
        least,
    )
    for precision in ("bf16", "fp16")
    for difference, least in (("central", 0.99), ("one_sided", 0.95))
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    """Checkpoints of models that were trained for 100 plain steps in fp32, by settings."""
    known: dict[tuple[str, ...], str] = {}

    def get(settings: list[str]) -> str:
        plain = [text.replace("meta_", "") for text in settings if text in BATCH or text.startswith("variant=")]
        if tuple(plain) not in known:
            out = tmp_path_factory.mktemp("trained")
            pool(1).run(bodies.train, [*plain, *RATE], "zero1", 1, str(out), 100)
            known[tuple(plain)] = str(out / "checkpoints" / "step-00000100")
        return known[tuple(plain)]

    return get


@pytest.mark.parametrize("at", ["start", "trained"])
@pytest.mark.parametrize("settings, lookahead, difference, least", PRODUCTS)
def test_mixed_product(trained, settings: list[str], lookahead: str, difference: str, least: float, at: str) -> None:
    """The engine's difference points where double backward does, in every precision."""
    source = trained(settings) if at == "trained" else ""
    run = pool(1).run(meta_bodies.mixed_products, [*settings, *RATE], source, lookahead, difference)
    assert run[0]["cosine"] > least, run


@pytest.mark.parametrize(
    "settings",
    [
        ["variant=meta_adpt"],
        ["variant=meta_adpt", "meta.order=theta_first"],
        ["variant=meta_adpt", "meta.lookahead=adam"],
        ["variant=meta_ffn", "meta.beta=0.01"],
        ["variant=meta_attn", "model.dropout=0.1"],
        ["variant=meta_ffn", "meta.order=theta_first", "meta.beta=0.01"],
        ["variant=meta_adpt", "model.position_kind=rotary"],
        ["variant=meta_adpt", "meta.order=simultaneous"],
        ["variant=meta_adpt", "meta.order=simultaneous", "meta.reuse=true"],
        ["variant=meta_adpt", "meta.order=simultaneous", "meta.reuse=true", "meta.difference=one_sided"],
        ["variant=meta_adpt", "data.mixed=true"],
        ["variant=meta_ffn", "data.mixed=true", "meta.order=simultaneous", "meta.reuse=true"],
    ],
    ids=" ".join,
)
def test_a_step_equals_one_with_double_backward(settings: list[str]) -> None:
    """Every stage of a step against float64, from what the engine itself hands to that stage.

    AdamW's step and Adam's derivative in a lookahead divide by the size of a gradient, element by element: where one is
    round-off, so is its whole step, and how far two steps end apart says nothing. From the same input each stage is well
    conditioned, and its bar follows from fp32's unit round-off u = 6e-8:

    - A pass: chains of about 2,000 roundings (two layers, each with sums over width, ffn and length, the vocabulary's and
      the batch's) give at most 2,000 u = 1.2e-4, and cancellation between rows no more than some ten times what is usual,
      which is sqrt(2,000) u = 3e-6. The bar is 1e-4.
    - The mixed product: a central difference of gradients that differ by the share `change` has their round-off divided by
      it, twice, and the truncation error that the same difference has in float64.
    - The hypergradient and AdamW's changes of the weights (AdamW's in fp32: the change, of size lr = 0.01, is rounded with
      the weight, of size 1 at most): 100 u each, with u / 0.01 = 6e-6 for the latter.
    """
    (errors,) = pool(1).run(meta_bodies.stages, settings)
    assert errors["gradient"] < 1e-4, errors
    assert errors["mixed"] < errors["mixed bar"] < 0.02, errors
    assert max(errors["hypergradient"], errors["theta"]) < 6e-6 and errors["update"] < 2e-5, errors


LAYOUTS = [
    ("zero0", 2, 1, []),
    ("zero2", 2, 1, []),
    ("zero3", 2, 1, []),
    ("zero2_offload", 2, 1, []),
    ("zero1", 2, 2, []),
    ("zero2", 2, 2, ["train.micro_batch=2"]),
    ("zero3", 2, 2, []),
    ("zero1", 4, 2, []),
    ("zero3", 4, 2, ["train.micro_batch=2"]),
    ("zero1", 1, 1, ["train.micro_batch=2"]),
    ("zero3", 1, 1, ["train.micro_batch=2"]),
]
# all languages of a step at once, in turn and from one point
MIXED = ["data.mixed=true"], ["data.mixed=true", "meta.order=simultaneous", "meta.reuse=true"]
LAYOUTS += [
    ("zero2", 2, 1, MIXED[0]),
    ("zero1", 2, 2, MIXED[1]),
    ("zero3", 2, 1, [*MIXED[1], "train.micro_batch=2"]),
    ("zero2_offload", 1, 1, [*MIXED[0], "train.idle_languages=host"]),
]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory):
    """Returns the facts and weights of a kind of step in one process, once each."""
    known: dict[tuple[str, ...], Any] = {}

    def get(kind: list[str]) -> Any:
        if tuple(kind) not in known:
            out = tmp_path_factory.mktemp("meta")
            facts = pool(1).run(bodies.train, SETTINGS + kind, "zero0", 1, str(out), STEPS)[0]
            known[tuple(kind)] = facts, bodies.weights(out / "checkpoints" / f"step-{STEPS:08d}")
        return known[tuple(kind)]

    return get


# A fixed radius: the controller would turn round-off in `change` into other radii. Three languages over rows of all.
SETTINGS = ["variant=meta_adpt", "meta.radius=1e-3", "meta.check_every=0", "meta.batch=12"]
STEPS = 2  # the second one starts from moments, and from a theta and phi that differ from the initial ones


@pytest.mark.parametrize("json_name, ranks, tensor, extra", LAYOUTS)
def test_every_layout_equals_one_process(one_process, json_name, ranks, tensor, extra, tmp_path: Path) -> None:
    kind = [text for text in extra if any(text in mixed for mixed in MIXED)]
    wanted, weights = one_process(kind)
    for facts in pool(ranks).run(bodies.train, SETTINGS + extra, json_name, tensor, str(tmp_path), STEPS):
        for step, expected in zip(facts, wanted, strict=True):
            assert step == pytest.approx(expected, rel=1e-3, abs=1e-5)
    for name, value in bodies.weights(tmp_path / "checkpoints" / f"step-{STEPS:08d}").items():
        if "linear_qkv.bias" not in name:  # a key bias has no gradient: Adam turns its round-off into steps
            assert (value - weights[name]).norm() <= 1e-3 * weights[name].norm() + 1e-6, name


@pytest.mark.parametrize(
    "json_name, tensor, extra",
    [("zero0", 1, []), ("zero2", 1, []), ("zero3", 1, []), ("zero1", 2, []), ("zero2", 1, MIXED[1])],
)
def test_resume_is_bit_exact(json_name: str, tensor: int, extra: list[str], tmp_path: Path) -> None:
    settings = ["variant=meta_adpt", "model.dropout=0.1", "meta.lookahead=adam", *extra]
    whole = pool(2).run(bodies.train, settings, json_name, tensor, str(tmp_path), 3, 1)
    source = tmp_path / "checkpoints" / "step-00000001"
    rest = pool(2).run(bodies.resumed, settings, json_name, tensor, str(source), 3)
    assert [facts[1:] for facts in whole] == rest


@pytest.mark.parametrize("json_name", ["zero0", "zero1", "zero2", "zero3"])
def test_only_the_steps_language_moves(json_name: str) -> None:
    """Weights and moments of the others are bit-identical after a meta step; theta is, through phase 1."""
    for moved, theta_moved_in_phase_1 in pool(2).run(
        meta_bodies.moved_by_a_meta_step, ["variant=meta_adpt", "meta.radius=1e-3"], json_name
    ):
        assert moved == 1 and not theta_moved_in_phase_1


def test_a_mixed_step_moves_all_languages() -> None:
    """The validation rows are of all of them, whatever the batch holds."""
    settings = ["variant=meta_adpt", "meta.radius=1e-3", "train.batch=2", "meta.batch=6", "data.mixed=true"]
    assert pool(2).run(meta_bodies.moved_by_a_meta_step, settings, "zero1") == [(3, False)] * 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_plain_training_on_the_rows_of_meta_steps_is_meta_steps_without_the_treatment(ranks: int) -> None:
    """The control of equal rows: a meta step that trains on every row and looks ahead by next to nothing."""
    without = ["meta.batch=8", "meta.order=simultaneous", "meta.reuse=true", "meta.terms=direct", "meta.beta=1e-12"]
    plain, shared = ["variant=adpt", "train.batch=16"], ["data.mixed=true", "train.precision=fp32"]
    meta = ["variant=meta_adpt", "train.batch=8", *without]
    untreated, same_rows, other_rows = (
        pool(ranks).run(meta_bodies.held_out_losses, [*settings, *shared])[0]
        for settings in (meta, [*plain, "data.meta_rows=8"], plain)
    )
    # both sum the same gradients in another order, round-off that AdamW keeps at its size for all but vanishing ones
    assert same_rows == pytest.approx(untreated, abs=1e-3)
    assert other_rows != pytest.approx(untreated, abs=1e-2)


ORDERS = {"phi_first": 5, "theta_first": 5, "simultaneous": 4}  # passes of a step


@pytest.mark.parametrize("order, failing", [(order, n) for order, passes in ORDERS.items() for n in range(passes)])
@pytest.mark.parametrize("precision, mixed", [("fp32", "false"), ("fp16", "false"), ("fp32", "true")])
def test_an_overflow_in_any_pass_changes_nothing(failing: int, precision: str, mixed: str, order: str) -> None:
    settings = ["variant=meta_adpt", f"train.precision={precision}", f"meta.order={order}", f"data.mixed={mixed}"]
    settings += ["meta.reuse=true"] if order == "simultaneous" else []
    (outcome,) = pool(1).run(meta_bodies.overflow, settings, "zero1", failing)
    assert outcome["unchanged"] and outcome["skipped"] == 1
    assert outcome["scale"] == (0.5 if precision == "fp16" else 1.0)


@pytest.mark.parametrize("json_name", ["zero2", "zero3"])
def test_no_rank_holds_a_full_gradient(json_name: str) -> None:
    """Of theta and phi_i (equally large here) a rank makes shards and buckets only, in any precision."""
    for largest, group, shard in pool(2).run(meta_bodies.largest_tensor, json_name):
        assert largest < 0.75 * group and shard < 0.6 * group  # ZeRO 3 gathers some layers of weights ahead


def test_subsets_of_languages_average_to_the_full_estimate() -> None:
    (error,) = pool(1).run(meta_bodies.subsets_error, ["variant=meta_adpt"])
    assert error < 1e-5


def test_languages_named_like_modules_are_routed_by_key() -> None:
    languages = ("te", "pt", "da", "as", "to", "ad", "en", "be")
    (right,) = pool(1).run(meta_bodies.routed_names, languages)
    assert right == set(languages)


def test_pcgrad_projects_off_conflicts() -> None:
    import numpy as np

    from mlinterf_ds.engine.pcgrad import project

    left, right = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    products = np.array([[1.0, -1.0], [-1.0, 2.0]])
    total, count = project([[left], [right]], products, np.random.default_rng(0))
    # (1, 0) loses its part along (-1, 1): (0.5, 0.5); (-1, 1) loses its part along (1, 0): (0, 1).
    assert count == 2 and torch.allclose(total[0], torch.tensor([0.5, 1.5]))
    total, count = project([[left], [left]], np.array([[1.0, 1.0], [1.0, 1.0]]), np.random.default_rng(0))
    assert count == 0 and torch.allclose(total[0], 2 * left)


@pytest.mark.parametrize("json_name, ranks, tensor", [("zero2", 2, 1), ("zero3", 2, 1), ("zero1", 2, 2)])
def test_pcgrad_at_every_layout(json_name: str, ranks: int, tensor: int) -> None:
    settings = ["variant=joint", "data.mixed=true", "treatment=pcgrad"]
    (wanted,) = pool(1).run(meta_bodies.pcgrad_facts, settings, "zero0", 1)
    for facts in pool(ranks).run(meta_bodies.pcgrad_facts, settings, json_name, tensor):
        for step, expected in zip(facts, wanted, strict=True):
            assert step == pytest.approx(expected, rel=1e-4)


def test_a_runs_first_step_searches_its_radius() -> None:
    """From a start far off, the first difference used is already near its target: the first self-check agrees."""
    (facts,) = pool(1).run(meta_bodies.first_steps, ["variant=meta_adpt", "train.precision=bf16", "meta.check_every=1"])
    first, second = facts
    assert 0.07 < first["meta/change"] < 0.32 and first["meta/radius"] != 1e-3, first
    assert first["meta/self_check"] > 0.9, first
    assert 0.4 < second["meta/radius"] / first["meta/radius"] < 2.1, "from then on it is followed, not searched"

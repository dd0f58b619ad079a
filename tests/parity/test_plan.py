"""Compares the arithmetic of tools/plan.py with what engines hold and send: memory within 10%, parameters and traffic exactly."""

import pytest

from mlinterf_ds import sections
from mlinterf_ds.engine import engine, throughput
from mlinterf_ds.errors import UserError
from mlinterf_ds.pretrain.config import load_run
from tests.parity import bodies, plan_bodies
from tests.ranks import pool
from tools.plan import arithmetic

SHAPE = ["model.layers=3", "model.width=128", "model.ffn=512", "data.sequence_length=64", "train.batch=16"]
SHAPE += ["meta.radius=1e-3"]  # no search in the first step
VOCABULARY = bodies.Made.vocabulary_size
BF16, FP16 = "train.precision=bf16", "train.precision=fp16"
# (DeepSpeed's JSON, ranks, tensor-parallel ranks, settings)
SETTINGS = [
    ("zero0", 1, 1, ["variant=adpt"]),
    ("zero0", 2, 1, ["variant=attn", BF16]),
    ("zero1", 1, 1, ["variant=joint", BF16, "model.position_kind=rotary"]),
    ("zero1", 2, 1, ["variant=adpt", BF16]),
    ("zero1", 2, 1, ["variant=share_adpt", FP16]),
    ("zero1", 2, 1, ["variant=meta_adpt", "meta.difference=one_sided"]),
    ("zero2", 2, 1, ["variant=ffn", BF16]),
    ("zero2", 2, 1, ["variant=adpt", BF16, "train.micro_batch=2"]),
    ("zero2", 2, 2, ["variant=adpt", "model.head_width=48", "model.position_kind=rotary"]),
    ("zero2", 2, 1, ["variant=meta_adpt", BF16]),
    ("zero2", 2, 1, ["variant=meta_ffn", BF16, "meta.lookahead=adam"]),
    ("zero3", 2, 1, ["variant=adpt", BF16]),
    ("zero3", 2, 2, ["variant=joint", BF16]),
    ("zero2", 4, 2, ["variant=attn", BF16]),
    ("zero1", 2, 2, ["variant=meta_adpt"]),
    ("zero1", 2, 2, ["variant=meta_ffn"]),
    ("zero1", 2, 2, ["variant=meta_attn"]),
    ("zero1", 2, 2, ["variant=meta_attn", "meta.order=simultaneous", "meta.reuse=true"]),
    ("zero1", 2, 1, ["variant=adpt", "data.mixed=true"]),
    ("zero1", 2, 2, ["variant=meta_ffn", "data.mixed=true"]),
]  # fmt: skip


def named(row) -> str:
    return "-".join([row[0], f"{row[1]}x{row[2]}", *(text.partition("=")[2] for text in row[3])])


@pytest.mark.parametrize("json_name, ranks, tensor, extra", SETTINGS, ids=map(named, SETTINGS))
def test_memory_and_traffic_of_a_step(json_name: str, ranks: int, tensor: int, extra: list[str]) -> None:
    settings = [*SHAPE, "data.sequence_length=32", "train.batch=8", *extra]  # bf16 is slow on most processors
    config = load_run([], [*bodies.TINY, f"parallel.tensor={tensor}", *settings])
    layout = arithmetic.PlannedLayout(ranks, tensor, int(json_name[4]), config.train.precision)
    count = arithmetic.parameters(config, len(bodies.LANGUAGES), VOCABULARY, tensor)
    planned = arithmetic.memory(config, count, layout, VOCABULARY, on_gpu=False)
    planned["vectors"] = planned.pop("gradients") + planned.pop("meta step", 0.0)
    measured = pool(ranks).run(plan_bodies.measure, settings, json_name, tensor, bodies.LANGUAGES)[0]
    for kind in ("weights", "optimizer", "own modules", "vectors", "activations"):
        print(f"{kind:<12}{planned[kind] / 1e6:>10.3f}{measured[kind] / 1e6:>10.3f} MB planned, measured")
        assert planned[kind] == pytest.approx(measured[kind], rel=0.1, abs=64), kind
    check_traffic(config, count, layout, measured["traffic"])


def check_traffic(
    config, count: arithmetic.ParameterCount, layout: arithmetic.PlannedLayout, traffic: dict[tuple[int, str], int]
) -> None:
    """Asserts that the planned bytes entered the collectives; norms and losses add a few scalars."""
    volume = arithmetic.data_parallel_volume(config, count, layout)
    inside = arithmetic.tensor_parallel_volume(config, layout)
    planned_by_size = [(layout.data, volume), (layout.tensor, {"all_reduce": inside})]
    if layout.tensor == layout.data:  # both kinds of group have two ranks
        planned_by_size = [(layout.data, volume | {"all_reduce": volume.get("all_reduce", 0.0) + inside})]
    for size, wanted in planned_by_size:
        for collective, planned in wanted.items():
            if size > 1:
                sent = traffic.get((size, collective), 0)
                least = 0.45 if layout.stage == 3 and collective == "all_gather" else 0.99
                most = 1.45 if layout.stage == 3 and collective == "all_gather" else 1.01
                assert least * planned - 2048 <= sent <= most * planned + 4096, (size, collective, planned, sent)


@pytest.mark.parametrize("variant", ["joint", "ffn", "attn", "adpt", "share_adpt"])
@pytest.mark.parametrize("tensor", [1, 2])
def test_parameters_are_those_of_the_encoder(variant: str, tensor: int) -> None:
    settings = [*SHAPE, f"variant={variant}", "model.language_embeddings=true", "model.head_width=16"]
    settings += ["model.position_kind=rotary"] * (variant == "ffn")
    config = load_run([], [*bodies.TINY, f"parallel.tensor={tensor}", *settings])
    count = arithmetic.parameters(config, len(bodies.LANGUAGES), VOCABULARY, tensor)
    assert (count.shared, count.own) == pool(tensor).run(plan_bodies.elements, settings, tensor, bodies.LANGUAGES)[0]


def test_a_module_that_the_plan_does_not_count_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_run([], [*bodies.TINY, *SHAPE, "variant=ffn"]).model_copy(update={"variant": "scale"})
    monkeypatch.setattr(sections, "ROUTED", (*sections.ROUTED, "scale"))
    with pytest.raises(
        UserError, match="variant=scale: the plan does not count its modules; add them to arithmetic.py"
    ):
        arithmetic.parameters(config, 2, VOCABULARY, 1)


def test_the_papers_large_model() -> None:
    """DESIGN: 16 layers, width 1280, 200k pieces, tied: 571M distinct parameters."""
    count = arithmetic.parameters(load_run(["large"]), 100, 200_000, 1)
    assert count.total == pytest.approx(571e6, rel=0.005)


@pytest.mark.parametrize(
    "settings, together", [([], 1), (["data.mixed=true"], 5), (["train.batch=16", "data.meta_rows=8"], 5)]
)
def test_how_many_languages_a_step_trains(settings: list[str], together: int) -> None:
    config = load_run(["tiny"], ["variant=adpt", *settings])
    assert arithmetic.parameters(config, 5, VOCABULARY, 1).together == together


def test_an_absent_language_costs_its_share_of_memory_and_nothing_else() -> None:
    config = load_run(["base"], ["train.idle_languages=device"])
    layout = arithmetic.PlannedLayout(64, 1, 1, "bf16")
    few, many = (arithmetic.parameters(config, languages, 250_000, 1) for languages in (2, 500))
    less, more = (arithmetic.memory(config, count, layout, 250_000) for count in (few, many))
    assert {kind for kind in less if less[kind] != more[kind]} == {"own modules"}
    assert more["own modules"] == pytest.approx(250 * less["own modules"])
    away = arithmetic.memory(load_run(["base"]), many, layout, 250_000)["own modules"]
    assert away == pytest.approx(many.own * (500 * 2 + 2 * 12 / 64)), (
        "on the host, idle ones leave their 16-bit weights"
    )
    assert arithmetic.FEW_LANGUAGES == engine.FEW_LANGUAGES
    assert arithmetic.data_parallel_volume(config, few, layout) == arithmetic.data_parallel_volume(config, many, layout)


@pytest.mark.parametrize(
    "extra",
    [
        ["variant=joint"],
        ["variant=joint", "train.micro_batch=4"],
        ["variant=ffn", "model.head_width=48"],
        ["variant=adpt", "data.sequence_length=128"],
        ["variant=joint", "model.recompute=true"],
        ["variant=meta_adpt"],
        ["variant=meta_adpt", "model.recompute=true"],
        ["variant=meta_adpt", "meta.difference=one_sided"],
        ["variant=meta_adpt", "meta.terms=direct"],
        ["variant=meta_adpt", "meta.every=2"],
        ["variant=meta_ffn"],
    ],
    ids=" ".join,
)
def test_flops_of_a_step(extra: list[str]) -> None:
    """The plan agrees with torch's count; it takes a pass to one language's gradients for two thirds of a whole pass."""
    config = load_run([], [*bodies.TINY, *SHAPE, *extra])
    counted = pool(1).run(plan_bodies.flops, [*SHAPE, *extra], bodies.LANGUAGES)[0]
    planned = arithmetic.step_flops(config, VOCABULARY)
    print(f"{planned / 1e9:.3f} planned, {counted / 1e9:.3f} counted GFLOP, ratio {planned / counted:.3f}")
    assert planned == pytest.approx(counted, rel=0.1)


def test_passes_of_a_meta_step() -> None:
    def passes(*settings: str) -> dict[str, float]:
        config = load_run([], ["variant=meta_adpt", *settings])
        return throughput.passes(config.variant, config.meta)

    assert passes() == {"forward": 5, "shared": 3, "own": 3, "write": 6, "validation": 1}
    assert passes("meta.terms=direct") == {"forward": 3, "shared": 3, "own": 1, "write": 2, "validation": 1}
    assert passes("meta.every=2")["forward"] == 3 and passes("meta.every=2", "meta.between=plain")["own"] == 2
    assert arithmetic.ring("all_reduce", 80.0, 4) == 120 and arithmetic.ring("all_gather", 80.0, 4) == 60

"""Records of a study that never ran: scores with planted differences, for which every verdict is known."""

from __future__ import annotations

import zlib
from typing import Any

from mlinterf_ds.results.records import AnalysisSummary, Records, TaskScore, TrainedModel

PAIRS = {"close": ["syn", "syn-close"], "far": ["syn", "syn-far"]}
# points above joint, (within, zero-shot)
PLANTED = {
    "joint": (0.0, 0.0), "ffn": (2.0, -60.0), "attn": (2.0, -20.0), "adpt": (2.0, 0.0), "share_adpt": (1.0, 3.0),
    "meta_adpt": (4.0, 6.0),
}  # fmt: skip
WITHIN, ZERO_SHOT, FLOOR, MAJORITY, LEXICAL = 80.0, 70.0, 30.0, 10.0, 55.0
NOISE = [0.2, -0.1, 0.3, -0.3, -0.1]  # by seed, common to all rows, plus a little of each row's own


def planted(
    seeds: int = 5,
    shifts: dict[str, tuple[float, float]] | None = None,
    mono: float = 3.0,
    low: float = -5.0,
    far: float = -4.0,
) -> Records:
    """Joint scores 80 within and 70 zero-shot; `mono` points above joint, mono at low resource `low` above joint; the
    source scores `far` points more with the distant partner than with the close one."""
    records = Records(source="syn", distances={"close": 0.2, "far": 0.95})
    table = PLANTED | (shifts or {})
    for seed in range(seeds):
        for number, (variant, (within, across)) in enumerate(table.items()):
            for name, languages in PAIRS.items():
                shift = far if name == "far" else 0.0
                on_source = WITHIN + within + shift
                target = languages[1]
                facts = {"set": name, "kind": "pair", "languages": languages, "variant": variant}
                records.scores += [
                    score(facts, seed, number, "syn", "syn", on_source),
                    score(facts, seed, number, target, target, WITHIN + within),
                    score(facts, seed, number, "syn", target, ZERO_SHOT + across),
                ]
                loss = 5.0 - (0.5 if variant == "meta_adpt" else 0.0)
                records.models.append(trained(facts, seed, loss + 0.001 * seed))
        _mono(records, seed, mono, low)
        _others(records, seed)
        _causes(records, seed)
    return records


def score(
    facts: dict[str, Any], seed: int, number: int, train: str, language: str, value: float, control: str = ""
) -> TaskScore:
    name = f"{facts['set']} {facts['variant']} {control} {train} {language} {seed}"
    noise = NOISE[seed % 5] + 0.01 * ((3 * seed + 2 * number) % 5) + 0.005 * (zlib.crc32(name.encode()) % 5)
    return TaskScore(
        **facts, control=control, seed=seed, task="pos", metric="f1", train=train, language=language, score=value + noise,
        majority=MAJORITY, lexical=LEXICAL,
    )  # fmt: skip


def trained(facts: dict[str, Any], seed: int, loss: float) -> TrainedModel:
    perplexity = (20.0 + seed) * ((0.9 + 0.001 * seed) if facts["variant"] == "meta_adpt" else 1.0)
    known, loss = dict.fromkeys(facts["languages"], perplexity), loss + 0.001 * (seed % 2) * len(facts["variant"])
    history = {code: [(0, 100.0), (10, value)] for code, value in known.items()}
    return TrainedModel(
        **facts, control="", seed=seed, steps=10, tokens=1000, seconds=1.0, perplexity=known, bits_per_character=known,
        history=history, early_loss=loss,
    )  # fmt: skip


def _mono(records: Records, seed: int, mono: float, low: float) -> None:
    for language in ("syn", "syn-close", "syn-far"):
        facts = {"set": language, "kind": "mono", "languages": [language], "variant": "mono"}
        records.models.append(trained(facts, seed, 5.0))
        shift = -2.0 if language == "syn" else 0.0  # the joint source scores lie between those of the two pairs
        records.scores.append(score(facts, seed, 8, language, language, WITHIN + mono + shift))
        if language == "syn":
            records.scores += [score(facts, seed, 8, "syn", target, FLOOR) for target in ("syn-close", "syn-far")]
    facts = {"set": "syn-far@400", "kind": "mono", "languages": ["syn-far"], "variant": "mono"}
    records.models.append(trained(facts, seed, 5.0))
    records.scores.append(score(facts, seed, 9, "syn-far", "syn-far", 60.0 + low))


def _others(records: Records, seed: int) -> None:
    """A low-resource pair, a triple, all languages, and a frozen fine-tuning."""
    facts: dict[str, Any] = {"set": "far-low", "kind": "low", "languages": ["syn", "syn-far"], "variant": "joint"}
    records.scores += [
        score(facts, seed, 0, "syn-far", "syn-far", 60.0),
        score(facts, seed, 0, "syn", "syn", WITHIN - 4.0),  # as with the whole partner
    ]
    facts = {"set": "far-tri", "kind": "triple", "languages": ["syn", "syn-far", "syn-far-2"], "variant": "joint"}
    records.scores += [
        score(facts, seed, 0, "syn-far", "syn-far", WITHIN + 0.1),
        score(facts, seed, 0, "syn", "syn-far", ZERO_SHOT + 5.0),
    ]
    facts = {"set": "many", "kind": "many", "languages": ["syn", "syn-close", "syn-far"], "variant": "joint"}
    records.scores.append(score(facts, seed, 0, "syn-far", "syn-far", WITHIN + 9.0))
    facts = {"set": "far", "kind": "pair", "languages": PAIRS["far"], "variant": "adpt"}
    records.scores.append(score(facts, seed, 3, "syn-far", "syn-far", WITHIN - 1.0, control="freeze"))


def _causes(records: Records, seed: int) -> None:
    common = {"set": "far", "languages": PAIRS["far"], "variant": "joint", "seed": seed}
    facts: dict[str, Any] = {"within": 0.8 + 0.01 * seed, "between": 0.5}
    records.analyses.append(AnalysisSummary(**common, analysis="conflict", facts=facts))
    cosines = {(0, "attention"): 0.9, (0, "ffn"): 0.7, (1, "attention"): 0.6, (1, "ffn"): 0.4}
    layers = [
        {
            "layer": str(layer),
            "component": part,
            "left": left,
            "right": right,
            "cosine": str(value + 0.01 * seed * (1 - layer) * (1 + (part == "ffn"))),
        }
        for (layer, part), value in cosines.items()
        for left, right in (("syn", "syn-far"), ("syn", "syn"))
    ]
    layers.append({"layer": "all", "component": "all", "left": "syn", "right": "syn-far", "cosine": "0.1"})
    records.analyses.append(AnalysisSummary(**common, analysis="prune", facts={"layers": layers}))

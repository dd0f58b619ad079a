"""Predicts a run before it starts: memory of a rank by kind, communication, time, and which layouts fit the GPU.

    python tools/plan.py --recipe base --nodes 16 --gpus 8 --gpu h100 --languages 100 --vocabulary 250000
    python tools/plan.py --recipe base --nodes 16 --languages 100 --figures plan/base

The plan assumes that a device reaches the shares of its data sheet that an H100 was measured to reach (`tools/plan/pace.py`), or
what `--calibrate` measured on one of its kind; that collectives are rings at the full speed of the links and none of them
overlaps with arithmetic, that attention is flash attention, and that a tenth of the memory goes to
the driver and to fragmentation. Real runs hold within 10% of the planned memory, send the planned bytes, and compute within
10% of the planned FLOPs (tests/parity/test_plan.py). `tools/bench.py plan` shows planned and measured steps side by side.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mlinterf_ds.data.corpus import Corpus
from mlinterf_ds.errors import UserError
from mlinterf_ds.pretrain.config import RunConfig, load_run
from tools.plan import arithmetic, pace
from tools.plan.calibrate import calibrate, kept_rates, rates_file

GIB = 2**30
GPUS = (8, 16, 32, 64, 128, 256, 512)
LANGUAGES = (2, 5, 10, 25, 50, 100, 250, 500)


@dataclass(frozen=True)
class Plan:
    """What the run needs at one layout."""

    layout: arithmetic.PlannedLayout
    micro: int  # rows of a micro-batch
    memory: dict[str, float]  # bytes by kind
    seconds: dict[str, float]  # seconds of a step, by cause
    sent: dict[str, float]  # bytes that a rank sends in a step, by collective
    days: float  # days of the whole run
    fits: bool

    @property
    def gib(self) -> float:
        return sum(self.memory.values()) / GIB


def make(options: argparse.Namespace, config: RunConfig, ranks: int, tensor: int, stage: int, languages: int) -> Plan:
    """Plans the run at this layout, with the configuration's micro-batch or else the largest one that fits."""
    layout = arithmetic.PlannedLayout(ranks, tensor, stage, options.precision)
    device = device_of(options)
    count = arithmetic.parameters(config, languages, options.vocabulary, tensor)
    rows = max(1, config.train.batch // layout.data)
    sizes = [size for size in range(rows, 0, -1) if rows % size == 0]
    for size in [fixed] if (fixed := config.train.fixed_micro_batch) else sizes:
        train = config.train.model_copy(update={"micro_batch": size})
        tried = config.model_copy(update={"train": train})
        memory = arithmetic.memory(tried, count, layout, options.vocabulary)
        memory["activations"] *= options.rates.held
        fits = sum(memory.values()) <= arithmetic.USABLE * device.memory
        if fits:
            break
    rates = options.rates
    seconds = pace.compute_seconds(tried, count, layout, rates, options.vocabulary)
    seconds |= arithmetic.communication_seconds(tried, count, layout, device, options.gpus)
    sent = {
        f"{name}, data parallel": arithmetic.ring(name, volume, layout.data)
        for name, volume in arithmetic.data_parallel_volume(tried, count, layout).items()
    }
    if tensor > 1:
        sent["all_reduce, tensor parallel"] = arithmetic.ring(
            "all_reduce", arithmetic.tensor_parallel_volume(tried, layout), tensor
        )
    days = sum(seconds.values()) * config.train.steps / 86400
    return Plan(layout, size, memory, seconds, sent, days, fits)


def device_of(options: argparse.Namespace) -> arithmetic.Device:
    """The GPU, with its share of the host's network where `--network` gives its speed."""
    device = arithmetic.DEVICES[options.gpu]
    return replace(device, far=options.network * 1e9 / 8 / options.gpus) if options.network else device


def layouts(options: argparse.Namespace, config: RunConfig, ranks: int, languages: int) -> list[Plan]:
    """A plan for every ZeRO stage at every tensor-parallel size that divides the model."""
    return [
        make(options, config, ranks, tensor, stage, languages)
        for tensor in (1, 2, 4, 8)
        for stage in (0, 1, 2, 3)
        if arithmetic.divides(config, arithmetic.PlannedLayout(ranks, tensor, stage, options.precision), options.gpus)
    ]


def best(plans: list[Plan]) -> Plan | None:
    """The fastest plan that fits, of equally fast ones the one with most memory left; None if none fits."""
    return min((p for p in plans if p.fits), key=lambda p: (round(p.days, 3), p.gib), default=None)


def table(rows: list[tuple[str, ...]]) -> str:
    """Lays the rows out in right-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def show(options: argparse.Namespace, config: RunConfig, plans: list[Plan]) -> None:
    """Prints all layouts, then the memory, traffic and time of the fastest one that fits."""
    count = arithmetic.parameters(config, options.languages, options.vocabulary, 1)
    ranks = options.nodes * options.gpus
    own = f"{count.own:,} for each of {count.languages} languages" if count.languages else "none of one language"
    print(
        f"{config.name}, {config.variant}, {options.languages} languages: {count.total / 1e6:,.0f}M parameters "
        f"({count.shared / 1e6:,.0f}M shared, {own}), {options.vocabulary:,} pieces\n"
        f"{ranks} x {options.gpu}, {options.precision}, {config.train.batch} rows of {config.data.sequence_length} tokens, "
        f"{config.train.steps:,} steps; rates of {options.gpu}: {options.rates_from}\n"
    )
    head = ("tensor", "ZeRO", "micro-batch", "GiB", "fits", "s/step", "days")
    rows = [
        (f"{p.layout.tensor}", f"{p.layout.stage}", f"{p.micro}", f"{p.gib:,.1f}", "yes" if p.fits else "no",
         f"{sum(p.seconds.values()):.3f}", f"{p.days:,.2f}")
        for p in plans
    ]  # fmt: skip
    print(table([head, *rows]))
    chosen = best(plans)
    if chosen is None:
        print(f"\nnothing fits {options.gpu}: try more nodes, model.recompute=true or a smaller train.micro_batch")
        return
    step = sum(chosen.seconds.values())
    setting = f"parallel.tensor={chosen.layout.tensor}, ZeRO {chosen.layout.stage}, train.micro_batch={chosen.micro}"
    mfu = arithmetic.model_flops(config, options.vocabulary) / (step * ranks * arithmetic.DEVICES[options.gpu].peak)
    print(f"\nfastest that fits: {setting}, MFU {mfu:.0%}\n")
    print(table([("memory of a rank", "GiB"), *((k, f"{v / GIB:,.3f}") for k, v in chosen.memory.items())]))
    print()
    print(table([("sent by a rank in a step", "MB"), *((k, f"{v / 1e6:,.1f}") for k, v in chosen.sent.items())]))
    print()
    print(table([("a step", "ms"), *((k, f"{1e3 * v:,.2f}") for k, v in chosen.seconds.items())]))


def figures(options: argparse.Namespace, config: RunConfig, stem: Path) -> None:
    """Draws memory and days against the number of GPUs (at --languages) and of languages (at --nodes x --gpus)."""
    from tools.plan.figures import scaling

    limit = arithmetic.USABLE * arithmetic.DEVICES[options.gpu].memory / GIB
    ranks = options.nodes * options.gpus
    by_gpus = [(gpus, options.languages) for gpus in GPUS if config.train.batch % gpus == 0]
    by_languages = [(ranks, languages) for languages in LANGUAGES]
    for axis, label, points, fixed in (
        ("gpus", "GPUs", by_gpus, f"{options.languages} languages"),
        ("languages", "languages", by_languages, f"{ranks} GPUs"),
    ):
        rows = []
        for (gpus, languages), stage in itertools.product(points, (0, 1, 2, 3)):
            plan = make(options, config, gpus, config.parallel.tensor, stage, languages)
            rows.append({"gpus": gpus, "languages": languages, "stage": stage, "gib": plan.gib, "days": plan.days})
        title = f"{config.name}, {config.variant}, {fixed}, {options.gpu}, {options.precision}"
        path = stem.with_name(f"{stem.name}-{axis}.png")
        scaling(rows, axis, label, path, title=title, limit=limit)
        print(f"{path} (and .svg, .csv)")


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append", default=[], help="TOML file or shipped recipe's name; repeatable")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="repeatable")
    parser.add_argument("--nodes", type=int, default=1, help="number of nodes (default 1)")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of a node (default 8)")
    parser.add_argument("--gpu", choices=sorted(arithmetic.DEVICES), default="h100", help="model of GPU (default h100)")
    parser.add_argument("--languages", type=int, help="number of languages (default: the corpus's, or else 2)")
    parser.add_argument(
        "--vocabulary", type=int, help="pieces of the vocabulary (default: the corpus's, or else 32000)"
    )
    parser.add_argument(
        "--network", type=float, metavar="GBIT/S", help="speed of a host's network (default: usual for the GPU)"
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="measure the GPU at hand for a minute; later plans for its kind use the rates",
    )
    parser.add_argument(
        "--figures", type=Path, metavar="STEM", help="draw STEM-gpus and STEM-languages (png, svg, csv)"
    )
    parser.add_argument("--json", type=Path, help="write the plan of every layout to this file")
    options = parser.parse_args(words)
    for name in ("nodes", "gpus", "languages", "vocabulary"):
        if (given := getattr(options, name)) is not None and given < 1:
            raise UserError(f"--{name} {given}: expected 1 or more")
    if options.network is not None and not options.network > 0:
        raise UserError(f"--network {options.network}: expected gigabits a second, e.g. 10")
    return options


def count_corpus(options: argparse.Namespace, config: RunConfig) -> None:
    """Sets the number of languages and pieces: those given, else those of `corpus=` and `languages=`, else 2 and 32,000.

    Raises UserError for a folder that is no corpus, and for numbers that are not the corpus's.
    """
    counts = {"languages": len(config.languages or []), "vocabulary": 0}
    if config.corpus != "synthetic":
        corpus = Corpus.open(config.corpus, config.languages)
        counts = {"languages": len(config.languages or corpus.languages), "vocabulary": corpus.vocabulary_size}
    for name, usual in (("languages", 2), ("vocabulary", 32000)):
        given = getattr(options, name)
        if given and counts[name] and given != counts[name]:
            source = "languages=" if config.corpus == "synthetic" else f"corpus={config.corpus}"
            raise UserError(
                f"--{name} {given}: {source} has {counts[name]}; leave --{name} out, or plan without {source}"
            )
        setattr(options, name, given or counts[name] or usual)


def main(words: Sequence[str]) -> int:
    """Plans the run that the command line describes; returns the exit code."""
    options = arguments(words)
    config = load_run(options.recipe, options.set, "tiny")
    count_corpus(options, config)
    options.precision = {"auto": "fp16"}.get(config.train.precision, config.train.precision)  # auto on GPUs
    if options.calibrate:
        gpu, rates = calibrate(options.precision)
        print(f"{gpu}, {options.precision}: {rates}; kept in {rates_file(gpu)}")
        return 0
    measured = kept_rates(options.gpu, options.precision)
    options.rates = measured or pace.Rates.expected(arithmetic.DEVICES[options.gpu], options.precision)
    options.rates_from = f"measured, {rates_file(options.gpu)}" if measured else "shares of its data sheet"
    ranks = options.nodes * options.gpus
    plans = layouts(options, config, ranks, options.languages)
    if not plans:
        micro = (
            f", in micro-batches of train.micro_batch={config.train.micro_batch}"
            if config.train.fixed_micro_batch
            else ""
        )
        raise UserError(
            f"train.batch={config.train.batch} cannot be divided over {ranks} GPUs{micro}: change one of them"
        )
    show(options, config, plans)
    try:
        if options.json:
            rows = [asdict(plan) | {"gib": plan.gib} for plan in plans]
            options.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
        if options.figures:
            figures(options, config, options.figures)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written ({error.strerror})") from None
    return 0

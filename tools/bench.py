"""Measure side by side, in one run and interleaved, so that a noisy machine disturbs all alike; ratios, not seconds.

python tools/bench.py step        our step against transformers' XLM-RoBERTa and the step's bare matrix products
python tools/bench.py meta        a meta step in plain steps: central, one-sided, by number of languages; memory
python tools/bench.py languages   a step with 100 languages in the model against 2, on two ranks
python tools/bench.py conflict    the projected gradients' similarities of 32 languages beside the gradients themselves
python tools/bench.py plan        steps of eleven shapes and variants in those of one, measured and as tools/plan.py has them
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
CODES = [f"l{number}" for number in range(100)]


class Made:
    """A corpus of random tokens in memory."""

    def __init__(self, languages: Sequence[str], vocabulary: int):
        self.languages, self.vocabulary_size = list(languages), vocabulary
        self._tokens = np.random.default_rng(0).integers(5, vocabulary, 200_000)

    def sentences(self, lang: str, split: str) -> int:
        return 1000

    def characters(self, lang: str, split: str) -> int:
        return 10_000

    def tokens(self, lang: str, split: str) -> np.ndarray:
        return self._tokens

    def unchanged(self, language: str, split: str) -> bool:
        return True


def interleaved(work: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each piece of work, once a round, after one round to warm up."""
    from deepspeed.accelerator import get_accelerator

    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, run in work.items():
            started = time.perf_counter()
            run()
            get_accelerator().synchronize()
            if number:
                seconds[name].append(time.perf_counter() - started)
        print(f"round {number}/{rounds}", end="\r", file=sys.stderr)
    return seconds


def ratio(above: list[float], below: list[float]) -> dict[str, float]:
    """Median and range over rounds of above / below, each measured in the same round."""
    found = [a / b for a, b in zip(above, below, strict=True)]
    return {"median": statistics.median(found), "least": min(found), "most": max(found)}


def build(options: argparse.Namespace, languages: Sequence[str], recipe: str, settings: list[str], ds: str) -> Any:
    """(engine, train batch of step n, validation batch of step n) on random tokens."""
    from mlinterf_ds.data.stream import TrainStream, ValidationStream
    from mlinterf_ds.engine.engine import Engine
    from mlinterf_ds.engine.precision import read_json
    from mlinterf_ds.model.encoder import Encoder
    from mlinterf_ds.pretrain.config import load_run
    from mlinterf_ds.runtime import parallel

    config = load_run([recipe], [*options.set, *settings])
    corpus = Made(languages, options.vocabulary)
    length = config.data.sequence_length
    model = Encoder(
        config.model, variant=config.routing, languages=languages, vocabulary=options.vocabulary, positions=length
    )
    layout = parallel.current(1)
    engine = Engine(model, config, read_json(ROOT / "ds_configs" / f"{ds}.json"), options.precision, layout)
    stream = TrainStream(corpus, languages, rows=config.train.batch, length=length, seed=0)
    per_step = config.meta.languages_per_step
    held = None
    if len(languages) > 1:
        rows = config.meta.batch or config.train.batch
        held = ValidationStream(corpus, languages, rows=rows, length=length, seed=0, languages_per_step=per_step)

    def train(step: int) -> list[Any]:
        return [stream.batch(step, *rows) for rows in engine.slices(config.train.batch)]

    def validation(step: int) -> list[Any]:
        assert held is not None
        return [held.batch(step, train(step)[0].step_languages[0], *rows) for rows in engine.slices(held.rows)]

    return engine, train, validation


def shapes(options: argparse.Namespace) -> list[str]:
    found = [f"train.batch={options.rows}", f"meta.batch={options.rows}", f"data.sequence_length={options.length}"]
    return [*found, f"model.dropout={options.dropout}", f"model.attention_dropout={options.dropout}"]


def theirs(options: argparse.Namespace, engine: Any, batch: Any) -> Callable[[], None]:
    """A training step of transformers' masked LM with the same shapes, on the same rows."""
    try:
        from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM
    except ImportError:
        sys.exit("error: this comparison needs transformers: pip install transformers")
    shape, dtype = engine.config.model, next(engine.model.parameters()).dtype
    config = XLMRobertaConfig(
        vocab_size=options.vocabulary, hidden_size=shape.width, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, intermediate_size=shape.ffn, max_position_embeddings=options.length + 2,
        hidden_dropout_prob=options.dropout, attention_probs_dropout_prob=options.dropout, type_vocab_size=1,
    )  # fmt: skip
    model = XLMRobertaForMaskedLM(config).to(engine.device, dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = batch.to(engine.device)
    labels = torch.full_like(batch.tokens, -100).scatter(1, batch.positions, batch.labels)

    def step() -> None:
        model(input_ids=batch.tokens, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def products(options: argparse.Namespace, engine: Any, masked: int) -> Callable[[], None]:
    """The step's matrix products alone, forward and backward (two more of each)."""
    shape, dtype = engine.config.model, next(engine.model.parameters()).dtype
    tokens, inner = options.rows * options.length, shape.heads * shape.kv_channels
    linear = [(tokens, shape.width, 3 * inner), (tokens, inner, shape.width)] * shape.layers
    linear += [(tokens, shape.width, shape.ffn), (tokens, shape.ffn, shape.width)] * shape.layers
    linear += [(masked, shape.width, shape.width), (masked, shape.width, options.vocabulary)]

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=engine.device).to(dtype)

    made = {size: (random(*size[:2]), random(*size[1:])) for size in set(linear)}
    heads = options.rows * shape.heads
    scores, values = (random(heads, options.length, last) for last in (options.length, shape.kv_channels))

    def run() -> None:
        for size in linear:
            left, right = made[size]
            out = left @ right
            _ = out @ right.T, left.T @ out
        for _ in range(3 * shape.layers):
            _ = scores @ values, values @ values.transpose(1, 2)

    return run


def bench_step(options: argparse.Namespace) -> dict[str, Any]:
    engine, train, _ = build(options, ["l0"], "paper_8heads", [f"variant={options.variant}", *shapes(options)], "zero0")
    (batch,) = train(0)
    work = {"ours": lambda: engine.train_step([batch]), "transformers": theirs(options, engine, batch)}
    work["products"] = products(options, engine, batch.positions.numel())
    if options.profile:
        from torch.profiler import profile

        work["ours"]()
        with profile() as found:
            work["ours"]()
        print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=40))
    seconds = interleaved(work, options.rounds)
    tokens = options.rows * options.length
    return {
        "tokens_per_second": {name: tokens / statistics.median(found) for name, found in seconds.items()},
        "times_transformers": ratio(seconds["transformers"], seconds["ours"]),
        "times_products": ratio(seconds["ours"], seconds["products"]),
    }


def exact_step(engine: Any, batch: Any, held: Any) -> Callable[[], None]:
    """The same hypergradient and updates by double backward, one process, plain torch."""
    from mlinterf_ds.meta.bilevel import GradientDescent
    from mlinterf_ds.meta.local import LocalSpace, exact_hypergradient, gradients_of
    from mlinterf_ds.model.encoder import Encoder

    config, ours = engine.config, engine.model
    model = Encoder(
        config.model, variant=config.routing, languages=ours.languages, vocabulary=ours.vocabulary,
        positions=config.data.sequence_length,
    ).to(engine.device, next(ours.parameters()).dtype)  # fmt: skip
    model.twice_differentiable = True
    batch, held = batch.to(engine.device), held.to(engine.device)
    language = ours.languages[batch.step_languages[0]]
    theta = LocalSpace(list(model.shared_parameters().values()))
    phi = LocalSpace(list(model.language_parameters()[language].values()))
    updates = [torch.optim.AdamW(space.parameters, lr=1e-4, fused=True) for space in (phi, theta)]

    def update(place: int, space: Any, gradient: list[Any]) -> None:
        for parameter, piece in zip(space.parameters, gradient, strict=True):
            parameter.grad = piece.view_as(parameter)
        updates[place].step()
        updates[place].zero_grad()

    def step() -> None:
        def loss() -> Any:
            return model(batch)[0]

        h = exact_hypergradient(loss, lambda: model(held)[0], theta, phi, lookahead=GradientDescent(), beta=1e-4)
        update(0, phi, h)
        update(1, theta, gradients_of(loss)([theta])[0])

    return step


def meta_work(options: argparse.Namespace, count: int) -> dict[str, Callable[[], Any]]:
    from mlinterf_ds.engine.meta_step import MetaStep

    settings = ["variant=meta_adpt", "meta.check_every=0", *shapes(options)]
    engine, train, validation = build(options, CODES[:count], "paper_8heads", settings, "zero1")
    batches, held = train(0), validation(0)
    one_sided = MetaStep(engine, engine.config.meta.model_copy(update={"difference": "one_sided"}))
    central = MetaStep(engine, engine.config.meta)
    return {
        "plain": lambda: engine.train_step(batches),
        "central": lambda: central.step(batches, held),
        "one_sided": lambda: one_sided.step(batches, held),
        "double_backward": exact_step(engine, batches[0], held[0]),
    }


def _memory(options: argparse.Namespace, name: str, send: Any) -> None:
    _start(0, 1, tempfile.mkdtemp(), options.threads)
    from deepspeed.accelerator import get_accelerator

    run = meta_work(options, 2)[name]
    run()
    run()
    if get_accelerator().device_name() == "cpu":
        send.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    else:
        send.send(get_accelerator().max_memory_allocated() / 2**30)


def bench_meta(options: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for count in options.languages:
        work = meta_work(options, count)
        if count != options.languages[0]:
            work.pop("double_backward")  # once is enough
        seconds = interleaved(work, options.rounds)
        result[f"{count} languages"] = {
            f"{name} in plain steps": ratio(seconds[name], seconds["plain"]) for name in work if name != "plain"
        } | {"plain seconds": statistics.median(seconds["plain"])}
    context, peaks = multiprocessing.get_context("spawn"), {}
    for name in ("plain", "central"):
        receive, send = context.Pipe(duplex=False)
        child = context.Process(target=_memory, args=(options, name, send))
        child.start()
        peaks[name] = receive.recv()
        child.join()
    return result | {"peak memory GiB": peaks, "memory in plain training's": peaks["central"] / peaks["plain"]}


def _start(rank: int, world: int, folder: str, threads: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    from mlinterf_ds.runtime import parallel, session

    session.quiet(Path(folder) / f"rank-{rank}.log")
    parallel.start(1, f"file://{folder}/rendezvous")
    torch.set_num_threads(max(1, threads // world))


def _languages(rank: int, options: argparse.Namespace, folder: str, send: Any) -> None:
    from mlinterf_ds.engine.meta_step import MetaStep

    _start(rank, 2, folder, options.threads)
    result: dict[str, Any] = {}
    for ds in ("zero1", "zero2"):
        work: dict[str, Callable[[], Any]] = {}
        for count in (2, 100):
            settings = ["variant=meta_adpt", "meta.check_every=0"] + (
                ["meta.languages_per_step=4"] if count > 2 else []
            )
            engine, train, validation = build(options, CODES[:count], "tiny", settings, ds)
            batches, held = train(0), validation(0)
            meta = MetaStep(engine, engine.config.meta)
            work[f"plain {count}"] = lambda engine=engine, batches=batches: engine.train_step(batches)
            work[f"meta {count}"] = lambda meta=meta, batches=batches, held=held: meta.step(batches, held)
        seconds = interleaved(work, options.rounds)
        for kind in ("plain", "meta"):
            result[f"{ds} {kind}: 100 languages in steps of 2"] = ratio(seconds[f"{kind} 100"], seconds[f"{kind} 2"])
    if rank == 0:
        send.send(result)


def bench_languages(options: argparse.Namespace) -> dict[str, Any]:
    context, folder = multiprocessing.get_context("spawn"), tempfile.mkdtemp()
    receive, send = context.Pipe(duplex=False)
    ranks = [context.Process(target=_languages, args=(rank, options, folder, send)) for rank in range(2)]
    for process in ranks:
        process.start()
    while not receive.poll(1.0):
        if any(process.exitcode for process in ranks):
            sys.exit("error: a rank failed; its reason stands above")
    result: dict[str, Any] = receive.recv()
    for process in ranks:
        process.join()
    return result


def bench_conflict(options: argparse.Namespace) -> dict[str, Any]:
    """The paper's model: two gradients of `--rows` sequences for each language, projected one after another."""
    from mlinterf_ds.gradients.collect import DRAWS, Draws, gradient
    from mlinterf_ds.gradients.similarity import DIMENSION, measure

    count = options.languages[-1]
    settings = ["variant=joint", *shapes(options), "meta.languages_per_step=2"]
    engine, _, _ = build(options, CODES[:count], "paper", settings, "zero0")
    config = engine.config.conflict.model_copy(update={"sequences": options.rows, "micro_batch": options.rows})
    corpus = Made(CODES[:count], options.vocabulary)
    draws = Draws(
        corpus, corpus.languages, corpus.languages, config=config, length=options.length, mask_share=0.15, seed=0,
        engine=engine,
    )  # fmt: skip
    for _ in range(2):
        gradient(engine, draws.batches("l0", 0, 0))  # to warm up
    _, costs = measure(engine, draws, DIMENSION, seed=0)
    gradients = DRAWS * count
    return {
        "languages": count,
        "sequences of a gradient": options.rows,
        "times the gradients alone": costs["ratio"],
        "seconds of a gradient": costs["seconds_gradients"] / gradients,
        "seconds of a similarity": costs["seconds_similarity"] / gradients,  # its share of the products included
        "MB held beyond a gradient": costs["bytes_held"] / 1e6,
        "MB peak beyond a gradient": costs["bytes_peak_increase"] / 1e6,
    }


def bench_plan(options: argparse.Namespace) -> dict[str, Any]:
    """What one rank's arithmetic takes; traffic is held exactly by tests/parity/test_plan.py."""
    from mlinterf_ds.engine.meta_step import MetaStep

    sys.path.insert(0, str(ROOT))
    from tools.plan import arithmetic

    base = ["model.width=256", "model.ffn=1024", "model.heads=4", "model.layers=4", "meta.check_every=0"]
    changed = {
        "joint": [],
        "twice the width": ["model.width=512", "model.ffn=2048", "model.heads=8"],
        "twice the layers": ["model.layers=8"],
        "rows of four times the length": [f"data.sequence_length={4 * options.length}", f"train.batch={options.rows // 4}"],
        "recomputed": ["model.recompute=true"],
        "in four micro-batches": [f"train.micro_batch={options.rows // 4}"],
        "adpt": ["variant=adpt"],
        "meta_adpt": ["variant=meta_adpt"],
        "meta_adpt, one-sided": ["variant=meta_adpt", "meta.difference=one_sided"],
        "meta_adpt, direct term": ["variant=meta_adpt", "meta.terms=direct"],
        "meta_ffn": ["variant=meta_ffn"],
    }  # fmt: skip
    flops, work = {}, {}
    for name, own in changed.items():
        engine, train, validation = build(
            options, CODES[:4], "tiny", ["variant=joint", *shapes(options), *base, *own], "zero1"
        )
        batches = train(0)
        flops[name] = arithmetic.step_flops(engine.config, options.vocabulary)
        if engine.config.variant.startswith("meta_"):
            meta, held = MetaStep(engine, engine.config.meta), validation(0)
            work[name] = lambda meta=meta, batches=batches, held=held: meta.step(batches, held)
        else:
            work[name] = lambda engine=engine, batches=batches: engine.train_step(batches)
    seconds = interleaved(work, options.rounds)
    planned = {name: count / flops["joint"] for name, count in flops.items()}
    return {
        "measured": {name: ratio(found, seconds["joint"]) for name, found in seconds.items()},
        "planned": planned,
        "planned in measured": {
            name: planned[name] / ratio(found, seconds["joint"])["median"] for name, found in seconds.items()
        },
    }


MODES = {
    "step": bench_step, "meta": bench_meta, "languages": bench_languages, "conflict": bench_conflict, "plan": bench_plan
}  # fmt: skip


def show(tree: dict[str, Any], indent: int = 0) -> None:
    for name, value in tree.items():
        if isinstance(value, dict) and set(value) == {"median", "least", "most"}:
            print(f"{' ' * indent}{name:<44}{value['median']:8.2f}   ({value['least']:.2f} to {value['most']:.2f})")
        elif isinstance(value, dict):
            print(f"{' ' * indent}{name}")
            show(value, indent + 2)
        else:
            print(f"{' ' * indent}{name:<44}{value:8.2f}" if isinstance(value, float) else f"{name:<44}{value}")


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("mode", choices=[*MODES], nargs="?", default="step")
    found.add_argument(
        "--rows", type=int, help="rows of a batch (default: step 16, meta 32 and as many validation rows, conflict 64)"
    )
    found.add_argument("--length", type=int, default=128, help="tokens of a row")
    found.add_argument("--vocabulary", type=int, help="pieces (default: 32000, languages 2000)")
    found.add_argument(
        "--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="of weights and arithmetic"
    )
    found.add_argument("--dropout", type=float, default=0.1, help="all dropout rates")
    found.add_argument("--variant", default="joint", help="of `step`")
    found.add_argument(
        "--languages", type=int, nargs="+", default=[2, 8, 32], help="of `meta`; `conflict` takes the last"
    )
    found.add_argument("--rounds", type=int, default=7, help="times that each is measured")
    found.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of all ranks together")
    found.add_argument("--set", action="append", default=[], metavar="key=value", help="change the recipe's shapes")
    found.add_argument("--profile", action="store_true", help="also print our step's operators by their own time")
    found.add_argument("--json", type=Path, help="write the result here too")
    options = found.parse_args(words)
    options.rows = options.rows or {"meta": 32, "conflict": 64}.get(options.mode, 16)
    options.vocabulary = options.vocabulary or (2000 if options.mode == "languages" else 32_000)
    return options


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    options = arguments(words)
    if options.mode != "languages":
        _start(0, 1, tempfile.mkdtemp(), options.threads)
        from deepspeed.accelerator import get_accelerator

        from mlinterf_ds.engine.precision import bf16_arithmetic

        host = get_accelerator().device_name() == "cpu"
        if host and options.precision == "bf16" and not bf16_arithmetic():
            print("warning: this processor emulates bf16, some 100 times slower than fp32", file=sys.stderr)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    machine = {"device": device, "threads": options.threads}
    facts = machine | {"torch": torch.__version__, "precision": options.precision, "rounds": options.rounds}
    result = {"mode": options.mode, **facts, **MODES[options.mode](options)}
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


def command(words: Sequence[str]) -> int:
    main(words)
    return 0


if __name__ == "__main__":
    from mlinterf_ds.runtime.session import main as guarded

    guarded(command, sys.argv[1:])

"""`bench.py meta`: the time of a meta step over a plain step's, by kind of difference and number of languages; its memory."""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import torch

from tools.bench.engines import CODES, build, meta_step, plain_step, shapes, start
from tools.bench.timing import Work, busy_shares, interleaved, ratio


def measure(options: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for count in options.languages:
        work = steps(options, count)
        if count != options.languages[0]:
            work.pop("double_backward")  # its time does not depend on the number of languages
        seconds = interleaved(work, options.rounds)
        result[f"{count} languages"] = (
            {f"{name} in plain steps": ratio(seconds[name], seconds["plain"]) for name in work if name != "plain"}
            | {"plain seconds": statistics.median(seconds["plain"])}
            | busy_shares(work, seconds)
        )
    peaks = {name: peak_memory(options, name) for name in ("plain", "central")}
    return result | {"peak memory GiB": peaks, "memory in plain training's": peaks["central"] / peaks["plain"]}


def steps(options: argparse.Namespace, count: int) -> Work:
    """The plain step and the meta steps of a model of `count` languages, all on the same batches."""
    settings = ["variant=meta_adpt", "meta.check_every=0", *shapes(options)]
    engine, config, train, validation = build(options, CODES[:count], "paper_8heads", settings, "zero1")
    batches, held_out = train(0), validation(0)
    one_sided = config.meta.model_copy(update={"difference": "one_sided"})
    return {
        "plain": plain_step(engine, batches),
        "central": meta_step(engine, config.meta, batches, held_out),
        "one_sided": meta_step(engine, one_sided, batches, held_out),
        "double_backward": exact_step(engine, batches[0], held_out[0]),
    }


def exact_step(engine: Any, batch: Any, held_out: Any) -> Callable[[], None]:
    """The same hypergradient and updates by double backward, in one process and plain torch."""
    from mlinterf_ds.meta.bilevel import GradientDescent
    from mlinterf_ds.model.encoder import SHARED, Encoder
    from tools.bench.double_backward import LocalSpace, exact_hypergradient, gradients_of

    trained = engine.model
    model = Encoder(
        trained.config, variant=trained.variant, languages=trained.languages, vocabulary=trained.vocabulary,
        positions=trained.embeddings.longest,
    ).to(engine.device, next(trained.parameters()).dtype)  # fmt: skip
    model.twice_differentiable = True
    batch, held_out = batch.to(engine.device), held_out.to(engine.device)
    language = trained.languages[batch.step_languages[0]]
    groups = model.parameter_groups()
    theta, phi = (LocalSpace(list(groups[name].values())) for name in (SHARED, language))
    optimizers = [torch.optim.AdamW(space.parameters, lr=1e-4, fused=True) for space in (phi, theta)]

    def update(optimizer: torch.optim.Optimizer, space: Any, gradient: list[Any]) -> None:
        for parameter, piece in zip(space.parameters, gradient, strict=True):
            parameter.grad = piece.view_as(parameter)
        optimizer.step()
        optimizer.zero_grad()

    def step() -> None:
        def loss() -> Any:
            return model(batch)[0]

        lookahead = GradientDescent()
        h = exact_hypergradient(loss, lambda: model(held_out)[0], theta, phi, lookahead=lookahead, beta=1e-4)
        update(optimizers[0], phi, h)
        update(optimizers[1], theta, gradients_of(loss)([theta])[0])

    return step


def peak_memory(options: argparse.Namespace, name: str) -> float:
    """Peak GiB of a process of its own that runs this step twice."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_send_peak_memory, args=(options, name, send))
    child.start()
    peak: float = receive.recv()
    child.join()
    return peak


def _send_peak_memory(options: argparse.Namespace, name: str, send: Any) -> None:
    start(0, 1, tempfile.mkdtemp(), options.threads)
    from deepspeed.accelerator import get_accelerator

    run = steps(options, 2)[name]
    run()
    run()
    if get_accelerator().device_name() == "cpu":
        send.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    else:
        send.send(get_accelerator().max_memory_allocated() / 2**30)

"""The records that a pretraining run leaves: the MLflow run, config.json, train.csv, summary.json, and the table on the screen.

train.csv holds the training loss of every step: step, language, loss, lr, tokens. `loss` is the mean loss of the step's
predictions in that language, in nats; a step has a row for each of its languages. `tokens` counts the tokens of all
languages that training had seen after the step.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from mlinterf_ds.data.corpus import Corpus
from mlinterf_ds.errors import resumption
from mlinterf_ds.files import markdown_table, read_json, write_csv, write_json
from mlinterf_ds.pretrain.config import RunConfig
from mlinterf_ds.tracking import Tracker, dataset, environment_facts

if TYPE_CHECKING:  # the session needs megatron, the columns of train.csv do not
    from mlinterf_ds.runtime.session import Session

History = dict[str, list[tuple[int, float]]]  # (step, validation perplexity) of each language
COLUMNS = ["step", "language", "loss", "lr", "tokens"]  # columns of train.csv


class Records:
    """The records of a run, which rank 0 writes; on every other rank, and before `open`, no method does anything."""

    def __init__(self, config: RunConfig, session: Session):
        self.config, self.session = config, session
        self.tracker = Tracker.off()
        self.losses: LossTable | None = None

    def open(self, languages: tuple[str, ...], corpus: Corpus, run_id: str | None, step: int) -> None:
        """Begin, or go on at `step` with the MLflow run `run_id` of the run that is resumed."""
        if not self.session.first:
            return
        config, output = self.config, self.session.output
        write_json(output / "config.json", config.model_dump())
        summary = output / "summary.json"
        if (
            step < config.train.steps and summary.is_file()
        ):  # of fewer steps: until the end of these nothing is finished
            write_json(summary, read_json(summary) | {"finished": False})
        codes = ",".join(languages)
        own = {"variant": config.variant, "languages": codes, "seed": str(config.train.seed)}
        self.tracker = Tracker.start(
            enabled=config.tracking.enabled,
            experiment=config.tracking.experiment,
            name=output.name,
            folder=output,
            parameters=config.model_dump() | {"languages": codes},
            tags=environment_facts() | {"corpus manifest": corpus.manifest_hash} | own | config.tracking.tags,
            run_id=run_id,
            parent_id=config.tracking.parent,
            about=f"Pretraining: {config.variant} on {', '.join(languages)}, {config.train.steps} steps",
            datasets=[dataset(corpus.folder, corpus.manifest_hash, "training")],
        )
        self.losses = LossTable(output / "train.csv", step)
        self.tracker.artifact(output / "config.json")
        self.tracker.artifact(corpus.folder / "tokenizer.model")

    def add_losses(self, facts: Mapping[str, float], step: int) -> None:
        """Add the line of a step to train.csv."""
        if self.losses:
            losses = {name.removeprefix("loss/"): v for name, v in facts.items() if name.startswith("loss/")}
            tokens = self.config.rows_seen(step) * (self.config.data.sequence_length - 1)
            self.losses.add(step, losses, facts["lr"], tokens)

    def evaluated(self, metrics: Mapping[str, float], history: History, baselines: dict[str, float], step: int) -> None:
        """Log an evaluation; print the newest perplexities, draw all so far, and warn where they rise."""
        if not self.session.first:
            return
        self.tracker.log(metrics, step)
        shown = ", ".join(f"{language} {points[-1][1]:.2f}" for language, points in history.items())
        tqdm.write(f"step {step}: validation perplexity {shown}")
        for language, points in history.items():
            newest = [value for _, value in points[-4:]]
            if len(newest) == 4 and newest == sorted(newest) and newest[0] < newest[-1]:
                tqdm.write(f"warning: {language} has risen for three evaluations: {why_risen(language, self.config)}")
        from mlinterf_ds.plots.curves import perplexity_curves  # it loads matplotlib, which other ranks never need

        path = self.session.output / "perplexity.png"
        perplexity_curves(history, path, title=f"{self.config.name}: {self.config.variant}", baselines=baselines)
        self.tracker.artifact(path)

    def finish(self, summary: dict[str, Any], seen: Mapping[str, Mapping[str, float]], figures: list[Path]) -> None:
        """Write summary.json, send what the run made, print its table, and close; `seen`: language -> epochs of its text."""
        if not self.session.first:
            return
        output = self.session.output
        write_json(output / "summary.json", summary)
        self.tracker.artifact(output / "summary.json")
        if self.losses:
            self.losses.file.close()
            self.tracker.artifact(output / "train.csv")
        for path in figures:
            self.tracker.artifact(path)
        self.tracker.describe(description(summary))
        browse = self.tracker.browse() if self.config.tracking.enabled else ""
        show(summary, seen, output, browse)
        stopped = summary["stopped_by"]
        self.tracker.close("KILLED" if stopped and not stopped.startswith("train.") else "FINISHED")


def description(summary: Mapping[str, Any]) -> str:
    """The run in a few lines of Markdown, for its page in MLflow."""
    head = ["language", "validation perplexity", "unigram", "bits per character"]
    names = ("valid_perplexity", "unigram_perplexity", "valid_bits_per_character")
    rows = [[code, *(f"{summary[name][code]:.2f}" for name in names)] for code in summary["languages"]]
    return "\n".join([f"Pretraining: {summary['variant']}, {summary['steps']} steps", "", *markdown_table(head, rows)])


def show(summary: Mapping[str, Any], seen: Mapping[str, Mapping[str, float]], output: Path, browse: str) -> None:
    """Print a row for each language, what the run took, and how to go on or look."""
    measured = max((points[-1][0] for points in summary["history"].values() if points), default=summary["steps"])
    if measured != summary["steps"]:
        print(f"\nvalidation was last measured at step {measured} of these {summary['steps']}:", end="")
    print(f"\n{'language':<14}{'valid perplexity':>18}{'unigram':>10}{'bits/character':>16}{'epochs':>9}")
    for language in summary["languages"]:
        print(
            f"{language:<14}{summary['valid_perplexity'][language]:>18.2f}"
            f"{summary['unigram_perplexity'][language]:>10.1f}"
            f"{summary['valid_bits_per_character'][language]:>16.3f}{seen[language]['epochs']:>9.2f}"
        )
    print(
        f"{summary['steps']} steps in {summary['seconds']:.0f} s, {summary['tokens_per_second']:,.0f} tokens of training text/s, "
        f"MFU {100 * summary['mfu']:.2g}%; {output}/summary.json, perplexity.png, checkpoints/"
    )
    if summary["stopped_by"]:
        print(f"stopped by {summary['stopped_by']}; {resumption(output)}")
    if browse:
        print(f"browse: {browse}", flush=True)


class LossTable:
    """Appends to train.csv, on one rank only. Rows reach the disk at `file.flush`, which a run calls before each checkpoint."""

    def __init__(self, path: Path, step: int):
        """Opens the table at `step`. A resumed run repeats later steps, so their rows go, and so does a row cut short by a kill."""
        earlier: list[list[str]] = []
        if path.is_file() and step:
            with path.open(newline="", encoding="utf-8", errors="replace") as file:
                whole = (
                    r for r in csv.reader(file) if len(r) == len(COLUMNS) and r[0].isdecimal() and r[4].isdecimal()
                )
                earlier = [row for row in whole if int(row[0]) <= step]
        write_csv(path, COLUMNS, earlier)
        self.file = path.open("a", newline="", encoding="utf-8")
        self._table = csv.writer(self.file, lineterminator="\n")

    def add(self, step: int, losses: dict[str, float], lr: float, tokens: int) -> None:
        """Adds the rows of a step from its losses by language."""
        self._table.writerows([step, language, f"{loss:.6g}", f"{lr:.6g}", tokens] for language, loss in losses.items())


def why_risen(language: str, config: RunConfig) -> str:
    """Returns why a language's validation perplexity rises, and what to do about it."""
    if not config.data.only or language in config.data.only:
        return "its corpus is being overfitted"
    untrained = f"it is not trained (data.only={','.join(config.data.only)})"
    if config.train.freeze == "shared":  # all that its old pieces are predicted from stays as it was
        return (
            f"{untrained}, and the new pieces of the vocabulary now compete with its own; its own weights are as they were, so "
            f"use it with the model of init={config.init}, or train it too (without data.only); launch/evaluate.py tells its "
            "perplexity among the old pieces"
        )
    return (
        f"{untrained}, and the shared parameters move away from it; train it too (without data.only), or keep them as they are "
        "(train.freeze=shared)"
    )

"""The results of a fine-tuning job: summary.json, and tables for people."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mlinterf_ds.files import markdown_table
from mlinterf_ds.finetune.trial import FinetuneJob
from mlinterf_ds.tasks import metrics
from mlinterf_ds.tasks.sources import Options


def summarise(job: FinetuneJob, tested: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of summary.json. Scores in percent; std over seeds (sample), 0 for one seed.

    tested: one dictionary for each seed: {"point", "progress", "test": {language: metrics}}.
    """
    task, sets = job.task, job.sets
    scored = [language for language in job.rows["test"] if tested[0]["test"][language]]
    every = {
        language: {name: [facts["test"][language][name] for facts in tested] for name in tested[0]["test"][language]}
        for language in scored
    }
    baselines = {language: job.baselines[language] for language in scored}
    summary: dict[str, Any] = {
        "task": task.name,
        "metric": task.metric,
        "seeds": [facts["point"]["seed"] for facts in tested],
        "scores": {language: metrics.mean_std(every[language][task.metric]) for language in scored},
        "baseline": {language: baselines[language]["majority"][task.metric] for language in scored},
        "baselines": baselines,
        "metrics": {lang: {name: metrics.mean_std(v) for name, v in scores.items()} for lang, scores in every.items()},
        "per_seed": {language: every[language][task.metric] for language in scored},
        "setting": {lang: "within" if lang in sets.examples["train"] else "zero-shot" for lang in job.rows["test"]},
        "examples": {split: {lang: len(e) for lang, e in read.items()} for split, read in sets.examples.items()},
        "served_by": {lang: job.pretrained.languages[index] for lang, index in job.modules["test"].items()},
        "unscored": [language for language in job.rows["test"] if language not in scored],
        "chosen": {key: tested[0]["point"][key] for key in ("batch", "lr", "head_lr")},
        "dev": {str(facts["point"]["seed"]): facts["progress"]["best"] for facts in tested},
        "best_epoch": {str(facts["point"]["seed"]): facts["progress"]["best_epoch"] for facts in tested},
        "variant": job.pretrained.saved["config"]["variant"],
        "checkpoint": str(job.pretrained.path),
        "pretraining_seed": job.pretrained.saved["config"]["train"]["seed"],
        "languages": job.pretrained.languages,
        "data": sets.origin,
        "notes": sets.notes,
        "finished": True,
    }
    if task.metric == "accuracy":
        shares = {language: score["mean"] / 100 for language, score in summary["scores"].items()}
        totals = {language: sum(map(task.labelled, sets.examples["test"][language])) for language in scored}
        summary["interval"] = {code: list(metrics.wilson(shares[code] * n, n)) for code, n in totals.items()}
    if transfer := _transfer(job.options, summary["per_seed"]):
        summary["transfer"] = transfer
    return summary


def _transfer(options: Options, per_seed: dict[str, list[float]]) -> dict[str, Any] | None:
    """Correlates transfer with closeness to the training language, on synthetic languages."""
    if len(options["train"]) > 1 or "synthetic" not in options["train"].values():
        return None
    (source,) = options["train"]
    targets = [
        code for code, file in options["test"].items() if file == "synthetic" and code != source and code in per_seed
    ]
    if len(targets) < 3:
        return None
    from mlinterf_ds.data.synthetic import distance

    closeness = {code: 1 - distance(source, code) for code in targets}
    correlation = metrics.transfer_correlation(closeness, {code: per_seed[code] for code in targets})
    clean = {name: None if math.isnan(value) else value for name, value in correlation.items()}
    return {"source": source, "closeness": closeness, "rank_correlation": clean}


def table(summary: dict[str, Any]) -> str:
    """The scores as Markdown."""
    metric, seeds = summary["metric"], len(summary["seeds"])
    others = sorted({name for scores in summary["metrics"].values() for name in scores} - {metric})
    floors = sorted({name for scores in summary["baselines"].values() for name in scores} - {"majority"})
    title = f"{metric} (mean ± std of {seeds})" if seeds > 1 else metric
    head = ["language", "setting", "examples", title, "majority"]
    head += floors + [f"{name} (majority)" for name in others] + ["95% interval"] * ("interval" in summary)
    rows = []
    for language, setting in summary["setting"].items():
        cells = [language, setting, str(summary["examples"]["test"][language])]
        if language in summary["unscored"]:
            cells += ["labels withheld"] + [""] * (len(head) - 4)
        else:
            score, means = summary["scores"][language], summary["metrics"][language]
            cells += [_shown(score, seeds, 1), f"{summary['baseline'][language]:.1f}"]
            cells += [f"{summary['baselines'][language][name][metric]:.1f}" for name in floors]
            floor = summary["baselines"][language]["majority"]
            cells += [f"{means[name]['mean']:.1f} ({floor[name]:.1f})" for name in others]
            if "interval" in summary:
                cells.append("{:.1f} to {:.1f}".format(*summary["interval"][language]))
        rows.append(cells)
    lines = [f"# {summary['task']}: {summary['variant']}, {', '.join(summary['languages'])}", ""]
    lines += [
        *markdown_table(head, rows),
        "",
        f"Chosen by the dev set: {', '.join(f'{k} {v:g}' for k, v in summary['chosen'].items())}.",
    ]
    if "transfer" in summary:
        shown = {
            name: "n/a" if v is None else f"{v:.2f}" for name, v in summary["transfer"]["rank_correlation"].items()
        }
        lines += [f"Rank correlation of score with closeness: {shown['rho']} (95% {shown['low']} to {shown['high']})."]
    lines += [f"- {note}" for note in [*below(summary), *summary["notes"]]]
    return "\n".join(lines) + "\n"


def _shown(score: dict[str, float], seeds: int, digits: int) -> str:
    """A score, of several seeds with its standard deviation."""
    mean, std = (f"{score[key]:.{digits}f}" for key in ("mean", "std"))
    return f"{mean} ± {std}" if seeds > 1 else mean


def below(summary: dict[str, Any]) -> list[str]:
    """A sentence for each test language whose score is not above a baseline's, the best of them."""
    sentences = []
    for language, score in summary["scores"].items():
        floors = {name: scores[summary["metric"]] for name, scores in summary["baselines"][language].items()}
        best = max(floors, key=floors.__getitem__)
        if score["mean"] <= floors[best]:
            sentences.append(
                f"{language}: {summary['metric']} {score['mean']:.1f} is not above the {best} baseline, {floors[best]:.1f}, "
                "which needs no model"
            )
    return sentences


def show(summary: dict[str, Any], output: Path) -> str:
    """The results as they are printed at the end of the job."""
    names = sorted({name for scores in summary["baselines"].values() for name in scores}, reverse=True)
    columns = "".join(f"{name:>10}" for name in names)
    lines = [f"\n{'language':<12}{'setting':<11}{summary['metric']:>14}{columns}"]
    for language, setting in summary["setting"].items():
        if language in summary["scores"]:
            shown = _shown(summary["scores"][language], len(summary["seeds"]), 2)
            floors = "".join(f"{summary['baselines'][language][name][summary['metric']]:>10.2f}" for name in names)
            lines.append(f"{language:<12}{setting:<11}{shown:>14}{floors}")
        else:
            lines.append(f"{language:<12}{setting:<11}{'not scored':>14}")
    return "\n".join([*lines, *below(summary), f"{output}/summary.json, table.md, report.md, predictions/"])

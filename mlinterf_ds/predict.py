"""Tags, answers or classifies new text with a fine-tuned checkpoint.

The text has the format of the task's files, answers apart: a word a line (further columns may follow, of which the last is
replaced), SQuAD's JSON, or premises and hypotheses as TSV or JSON. Predictions are written in the format in which a
fine-tuning writes those of its test sets, and are the same for the same text.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlinterf_ds.config import with_present_keys
from mlinterf_ds.data.running_text import START, check_running_text
from mlinterf_ds.engine.precision import DTYPES, choose_precision
from mlinterf_ds.errors import UserError
from mlinterf_ds.files import write_text
from mlinterf_ds.finetune.config import FinetuneConfig
from mlinterf_ds.finetune.main import serving
from mlinterf_ds.pretrained import Finetuned, Pretrained
from mlinterf_ds.runtime.parallel import Group
from mlinterf_ds.runtime.session import in_group
from mlinterf_ds.sections import ParallelConfig
from mlinterf_ds.tasks import TASKS, Limits, Row, Task, spans
from mlinterf_ds.tasks.batches import best, outputs
from mlinterf_ds.tasks.columns import in_memory
from mlinterf_ds.tasks.files import read_text
from mlinterf_ds.tasks.heads import TaskModel
from mlinterf_ds.tasks.sources import parse
from mlinterf_ds.tasks.tagging import Tagger

LONGEST_WORD = 20  # characters: a longer line without a space is a sentence of a language that writes none


def main(arguments: Sequence[str], group: Group | None = None) -> int:
    """`launch/predict.py --checkpoint FINETUNING --text LANG=FILE`."""
    options = _options(arguments)
    ((language, file),) = options.text.items()
    with in_group(group, ParallelConfig()) as layout:
        from deepspeed.accelerator import get_accelerator

        finetuned = Finetuned.open(options.checkpoint)
        saved, pretrained = finetuned.saved, finetuned.pretrained
        config = FinetuneConfig.model_validate(with_present_keys(saved["config"]))
        module = module_of(options.modules, config, pretrained, saved.get("trained_on", []), language)
        task, labels = TASKS[config.task].configured(unlabelled=True), finetuned.labels
        examples = _sentences(task, Path(file)) if options.sentences else task.read(Path(file), language)
        limits = config.finetune.limits(pretrained.positions)
        rows, notes = task.rows(examples, pretrained.tokenizer(), labels, limits)
        model = TaskModel(
            kind=task.kind,
            classes=len(labels),
            seed=0,
            word=config.finetune.word,
            **pretrained.architecture(dropout=0.0),
        )
        device = torch.device(get_accelerator().current_device_name())
        dtype = DTYPES[_precision(options.precision, saved["layout"]["precision"])]
        pretrained.filled(model, layout).to(device, dtype)
        scores = outputs(model, task.kind, rows, module, layout, device)
        if layout.rank == 0:
            for note in notes:
                print(f"note: {note}", file=sys.stderr)
            predictions = task.predict(examples, rows, best(task.kind, scores), labels, limits)
            write(task, examples, predictions, options.out)
            if options.probabilities:
                chances = probabilities(task, examples, rows, scores, predictions, labels, limits)
                lines = [json.dumps(facts, ensure_ascii=False) for facts in chances]
                write_text(options.probabilities, "\n".join(lines) + "\n")
    return 0


def _precision(asked: str | None, tuned: str) -> str:
    """The precision that was asked for, else that of the fine-tuning, else, where this device lacks that one, the device's own."""
    try:
        return choose_precision(asked or tuned, {})[0]
    except UserError:
        if asked:
            raise
    return choose_precision("auto", {})[0]


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line, of which `text` becomes {language: file}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="a fine-tuning's output folder (of several seeds the first, its best epoch), one of its seed... folders, or a checkpoint",
    )
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="LANG=FILE",
        help="the text and its language; - is standard input",
    )
    parser.add_argument(
        "--sentences", action="store_true", help="the text has a sentence a line (tasks that tag words)"
    )
    parser.add_argument(
        "--modules", metavar="LANG", help="language whose modules read the text (default: as in testing)"
    )
    parser.add_argument("--out", type=Path, help="write the predictions to this file, not to standard output")
    parser.add_argument(
        "--probabilities", type=Path, metavar="FILE", help="write probabilities to this file, a JSON object an example"
    )
    parser.add_argument(
        "--precision",
        choices=("auto", *DTYPES),
        help="precision of weights and arithmetic (default: as fine-tuned, where this device has that)",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.text = parse(options.text, "text")
    if len(options.text) > 1:
        raise UserError(f"--text is given for {', '.join(options.text)}: predict one language at a time")
    for key, file in (("--out", options.out), ("--probabilities", options.probabilities)):
        if file and not file.parent.is_dir():
            raise UserError(f"{key} {file}: there is no folder {file.parent}")
    return options


def module_of(
    modules: str | None, config: FinetuneConfig, pretrained: Pretrained, trained_on: list[str], language: str
) -> int:
    """The number of the language whose modules read the text: the given one's, or the one that reads such a test set."""
    known = pretrained.languages
    if modules is None and config.finetune.route == "source" and not trained_on:
        raise UserError(f"{pretrained.path} does not say on which language it was trained: name it with --modules")
    if modules is None:
        if language not in known and config.finetune.route != "source" and not config.finetune.unseen:
            raise UserError(
                f"--text {language}: the model at {pretrained.path} has no modules for {language!r}, it knows {', '.join(known)}; "
                "choose one of them with --modules LANG"
            )
        return serving(config, pretrained, {"train": dict.fromkeys(trained_on, "")}, "text", language)
    if modules not in known:
        raise UserError(
            f"--modules {modules}: the model at {pretrained.path} knows {', '.join(known)}; name one of them"
        )
    return known.index(modules)


def _sentences(task: Task, path: Path) -> list[Any]:
    """The lines of a text as sentences, their words separated by white space."""
    if not isinstance(task, Tagger):
        raise UserError(f"--sentences: task {task.name} tags no words; give its file format")
    text = read_text(path)
    check_running_text(str(path), text[:START].encode())
    lines = [words for line in text.split("\n") if (words := line.split())]
    sentences = in_memory([(words, [task.blank] * len(words)) for words in lines], path)
    single = sum(len(words) == 1 and len(words[0]) > LONGEST_WORD for words in lines)
    if single <= len(lines) / 2:
        return sentences
    remark = f"{path}: {single} of {len(lines)} lines are one word, and get one tag: where a language writes no spaces, give a word a line"
    return [replace(sentence, remark=remark) for sentence in sentences]


def write(task: Task, examples: list[Any], predictions: list[Any], out: Path | None) -> None:
    """Writes the predictions to a file, or to standard output: in UTF-8, unless that is a terminal of another encoding."""
    if out:
        task.write(examples, predictions, out)
        return
    with tempfile.TemporaryDirectory() as folder:
        task.write(examples, predictions, Path(folder) / "predictions")
        content = (Path(folder) / "predictions").read_bytes()
    sys.stdout.flush()
    if sys.stdout.isatty():
        sys.stdout.write(content.decode())
    else:
        sys.stdout.buffer.write(content)
    sys.stdout.flush()


def probabilities(
    task: Task,
    examples: list[Any],
    rows: list[Row],
    scores: list[np.ndarray],
    predictions: list[Any],
    labels: list[str],
    limits: Limits,
) -> list[dict[str, Any]]:
    """The prediction of each example with its probabilities, as they are written.

    A task with labels gives the probability of every label, for each word or text. A question's answer has its share of the
    probability of all spans of at most `limits.max_answer` pieces in all windows, and of "no answer" where that is possible.
    """
    from scipy.special import softmax

    facts: list[dict[str, Any]] = [{"prediction": prediction} for prediction in predictions]
    if task.kind == "labels":
        for row, values in zip(rows, scores, strict=True):
            chances = [
                {label: round(float(chance), 4) for label, chance in zip(labels, position, strict=True)}
                for position in softmax(values, axis=-1)
            ]
            facts[row.example].setdefault("probabilities", []).extend(chances)
        return facts
    for example, fact in zip(examples, facts, strict=True):
        fact["id"] = example.id
    windows: list[list[np.ndarray]] = [[] for _ in examples]
    for row, values in zip(rows, scores, strict=True):
        windows[row.example].append(values.astype(np.float64))
    for fact, parts in zip(facts, windows, strict=True):
        none = min(start[0] + end[0] for start, end in parts)
        answers = [spans.span_scores(start[1:], end[1:], limits.max_answer) for start, end in parts]
        total = np.logaddexp.reduce(np.concatenate([*answers, [none] if "none" in labels else []]))
        best_score = max(float(values.max()) for values in answers)
        fact["probability"] = round(float(np.exp((best_score if fact["prediction"] else none) - total)), 4)
    return facts

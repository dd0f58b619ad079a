"""The fine-tuning command: read the task, search the grid, train every seed, test, report.

<output>/job.json                 configuration, data and MLflow run
<output>/seed0-batch16-lr0.0005/  a fine-tuning: checkpoints, result.json
<output>/predictions/seed0/sw.tsv in the task's own format
<output>/counts/seed0/sw.csv      right, predicted and gold per example: any sample's score follows from their sums
<output>/report.md, table.md      errors of the first seed; scores
<output>/summary.json
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlinterf_ds.config import load_config, parser
from mlinterf_ds.data.tokenizer import MANY_UNKNOWN, Tokenizer
from mlinterf_ds.engine.checkpoint import begun
from mlinterf_ds.engine.precision import choose_precision, read_deepspeed_json
from mlinterf_ds.errors import UserError
from mlinterf_ds.finetune.config import FinetuneConfig
from mlinterf_ds.finetune.search import Search
from mlinterf_ds.finetune.trial import FinetuneJob
from mlinterf_ds.pretrained import Pretrained
from mlinterf_ds.runtime.parallel import Group, Layout
from mlinterf_ds.runtime.session import session
from mlinterf_ds.tasks import TASKS, Limits, Row, Task
from mlinterf_ds.tasks.sources import SPLITS, Options, Sets, load, parse


def main(arguments: Sequence[str], group: Group | None = None) -> int:
    """Fine-tune as the command line says; `group` is the process group that this process has joined, if it has."""
    command = parser("Fine-tune a pretrained model on a task, and test it.", FinetuneConfig)
    for split in SPLITS:
        command.add_argument(
            f"--{split}", action="append", default=[], metavar="LANG=FILE", help="or LANG=synthetic; may be repeated"
        )
    command.add_argument(
        "--labels", metavar="OLD=NEW,...", help="labels of the files that are renamed: finetune.labels"
    )
    command.epilog = "--dev and --test also take LANG=split: a tenth of --train LANG.\n\n" + (command.epilog or "")
    options = command.parse_args(arguments)
    renamings = [f"finetune.labels={options.labels}"] if options.labels else []
    config = load_config(FinetuneConfig, options.recipe, [*options.set, *renamings])
    files = {split: parse(getattr(options, split), split) for split in SPLITS}
    run(config, files, read_deepspeed_json(options.deepspeed_config), group)
    return 0


def run(
    config: FinetuneConfig, options: Options, deepspeed_json: dict[str, Any], group: Group | None = None
) -> dict[str, Any]:
    """Fine-tune and test; the summary, which rank 0 also writes to summary.json in the output folder."""

    def refuse(output: Path) -> None:
        if (output / "job.json").is_file():
            if not config.resume:
                raise UserError(
                    f"{output} holds a fine-tuning: continue with --set resume=auto, or choose another output"
                )
        elif (output / "summary.json").is_file() or begun(output):
            raise UserError(f"{output} holds the results of another command: choose another output")

    with session(config.name, config.output, config.parallel, refuse, group) as here:
        precision, reason = choose_precision(config.train.precision, deepspeed_json)
        job = prepare(config, options, deepspeed_json, precision, here.layout)
        if here.first:
            print(_greeting(job, f"{precision} ({reason})", here.output), flush=True)
        return Search(job, here).run()


def prepare(
    config: FinetuneConfig, options: Options, deepspeed_json: dict[str, Any], precision: str, layout: Layout
) -> FinetuneJob:
    """Read checkpoint and data; every mistake in them is reported here, before anything is trained."""
    settings = config.finetune
    task = TASKS[config.task].configured(
        label_map=settings.labels, unknown_labels=settings.unknown_labels, unfound_answers=settings.unfound_answers
    )
    for batch in settings.batch:
        if batch % layout.data or (settings.micro_batch and batch // layout.data % settings.micro_batch):
            raise UserError(
                f"finetune.batch={batch} must be divisible by {layout.data} data-parallel ranks, and a rank's rows by "
                f"finetune.micro_batch={settings.micro_batch}"
            )
    pretrained = Pretrained.open(config.checkpoint)
    pretrained.check(layout.tensor)
    limits = settings.limits(pretrained.positions)
    modules = {
        split: {code: serving(config, pretrained, options, split, code) for code in options[split]} for split in SPLITS
    }
    sets = load(
        task,
        options,
        synthetic={"train": settings.synthetic_train, "dev": settings.synthetic_eval, "test": settings.synthetic_eval},
        limit=settings.limit,
    )
    labels = task.labels(list(itertools.chain(*sets.examples["train"].values())))
    rows = make_rows(task, sets, pretrained.tokenizer(), labels, limits)
    return FinetuneJob(
        config, options, deepspeed_json, precision, layout, pretrained, task, labels, limits, sets, rows, modules
    )


def make_rows(
    task: Task, sets: Sets, tokenizer: Tokenizer, labels: list[str], limits: Limits
) -> dict[str, dict[str, list[Row]]]:
    """The rows of every set (split -> language -> rows), whose examples are settled; what was cut is added to the notes."""
    rows: dict[str, dict[str, list[Row]]] = {split: {} for split in SPLITS}
    for split in SPLITS:
        for language, read in sets.examples[split].items():
            examples, unknown = task.settle(read, labels)
            sets.examples[split][language] = examples
            rows[split][language], notes = task.rows(examples, tokenizer, labels, limits)
            notes = [unknown, *notes] if unknown else notes
            pieces = [piece for row in rows[split][language] for piece in row.tokens]
            share = pieces.count(tokenizer.vocabulary.unk) / len(pieces)
            if share >= MANY_UNKNOWN:
                notes = [*notes, f"{share:.0%} of the pieces are <unk>, not in the vocabulary"]
            sets.notes += [f"{split} {language}: {note}" for note in notes]
    return rows


def serving(config: FinetuneConfig, pretrained: Pretrained, options: Options, split: str, language: str) -> int:
    """Returns the index of the language whose modules are used for this language's rows."""
    settings, known = config.finetune, pretrained.languages
    if settings.unseen and settings.unseen not in known:
        raise UserError(
            f"finetune.unseen={settings.unseen}: the model at {pretrained.path} has no modules for it, it knows "
            f"{', '.join(known)}; choose one of them"
        )
    if split != "train" and settings.route == "source":  # the epoch is chosen with the modules that are tested
        if len(options["train"]) > 1:
            raise UserError(
                f"finetune.route=source needs one training language, --train names {', '.join(options['train'])}: use target"
            )
        split, language = "train", next(iter(options["train"]))
    if language not in known and settings.unseen:
        language = settings.unseen
    if language not in known:
        raise UserError(
            f"--{split} {language}: the model at {pretrained.path} has no modules for {language!r}, it knows "
            f"{', '.join(known)}; choose one of them with --set finetune.unseen=LANG"
            + (", or use the training language's with --set finetune.route=source" if split != "train" else "")
        )
    return known.index(language)


def _greeting(job: FinetuneJob, precision: str, output: Path) -> str:
    counts = [
        f"{split} {', '.join(f'{language} {len(examples)}' for language, examples in job.sets.examples[split].items())}"
        for split in SPLITS
    ]
    lines = [f"{job.task.name} from {job.pretrained.path} ({job.pretrained.run_variant}), {precision}; output {output}"]
    return "\n".join([*lines, "examples: " + "; ".join(counts), *(f"note: {note}" for note in job.sets.notes)])

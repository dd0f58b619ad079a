"""Scores any text with a pretrained model (perplexity, pseudo-perplexity), and fills `<mask>` with words.

Perplexity is that of masked prediction, as during training: the share `data.mask` that the model was trained with, under fixed masks, rows packed.
Pseudo-perplexity (Salazar et al., 2020) masks the tokens of a sentence one at a time: exp of the mean surprisal over all of
them; it costs a forward pass a token. Both depend on the vocabulary: compare them under one tokenizer only.
Scores go to MLflow too, in a run under the pretraining run, where that was tracked.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from mlinterf_ds.data.batch import Batch
from mlinterf_ds.data.evaluation import EvaluationSet
from mlinterf_ds.data.running_text import START, check_running_text
from mlinterf_ds.data.tokenizer import MANY_UNKNOWN, Tokenizer, Vocabulary, lines_of, normalise
from mlinterf_ds.engine.engine import weighted_loss
from mlinterf_ds.engine.precision import DTYPES, choose_precision
from mlinterf_ds.errors import UserError
from mlinterf_ds.files import sha256, write_json
from mlinterf_ds.pretrained import Pretrained
from mlinterf_ds.runtime.parallel import Group, Layout
from mlinterf_ds.runtime.session import in_group
from mlinterf_ds.sections import ParallelConfig
from mlinterf_ds.tasks.files import read_text
from mlinterf_ds.tasks.sources import parse
from mlinterf_ds.tracking import Tracker, dataset, environment_facts

BLANK = "<mask>"
ROWS = 64  # rows that are evaluated at once


def main(arguments: Sequence[str], group: Group | None = None) -> int:
    """`launch/evaluate.py --checkpoint RUN --text sw=FILE` or `--fill "... <mask> ..." --language sw`."""
    options = _options(arguments)
    with in_group(group, ParallelConfig(tensor=options.tensor)) as layout:
        model = Model(options.checkpoint, layout, options.precision)
        if options.fill:
            results: Any = fill(model, options.fill, options.language, options.top)
        else:
            texts = options.text.items()
            results = {language: score(model, language, Path(path), options.sentences) for language, path in texts}
        if layout.rank == 0:
            if options.out:
                write_json(options.out, results)
            print(_shown(results), flush=True)
            if options.text and model.saved["config"]["tracking"]["enabled"]:
                record(model, options.text, results)
    return 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line, of which `text` becomes {language: file}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", required=True, help="a run's output folder (its best checkpoint) or a checkpoint"
    )
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="LANG=FILE",
        help="one sentence a line; lines do not see each other, unless the model was trained with data.boundaries=none; repeatable",
    )
    parser.add_argument(
        "--sentences", type=number(0), default=100, help="sentences scored by pseudo-perplexity (default 100; 0: none)"
    )
    parser.add_argument("--fill", metavar="TEXT", help=f"predict every {BLANK} of this text")
    parser.add_argument("--language", help="language of the text that --fill gives")
    parser.add_argument("--top", type=number(1), default=5, help="number of candidates shown for a mask (default 5)")
    parser.add_argument(
        "--precision",
        default="auto",
        choices=("auto", *DTYPES),
        help="precision of weights and arithmetic (default: the fastest that this device has)",
    )
    parser.add_argument("--tensor", type=number(1), default=1, help="ranks that share the model (tensor parallel)")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file too")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if bool(options.text) == bool(options.fill):
        raise UserError('give either --text LANG=FILE (repeatable) or --fill "... <mask> ..." with --language')
    options.text = parse(options.text, "text") if options.text else {}
    if "-" in options.text.values():
        raise UserError("--text LANG=-: the text is read more than once: give a file")
    if options.out and not options.out.parent.is_dir():
        raise UserError(f"--out {options.out}: there is no folder {options.out.parent}")
    return options


def number(least: int) -> Callable[[str], int]:
    """Returns the type of an argument that is a whole number, `least` or more."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, {least} or more")
        return int(text)

    return read


class Model:
    """A checkpoint's encoder and tokenizer on this rank, for evaluation."""

    def __init__(self, checkpoint: str, layout: Layout, precision: str = "auto"):
        from deepspeed.accelerator import get_accelerator

        pretrained = Pretrained.open(checkpoint)
        self.languages, self.path, self.layout = pretrained.languages, pretrained.path, layout
        self.saved, self.length, self.row_format = pretrained.saved, pretrained.positions, pretrained.row_format
        self.tokenizer = pretrained.tokenizer()
        self.device = torch.device(get_accelerator().current_device_name())
        self.encoder = pretrained.encoder(layout, self.device, DTYPES[choose_precision(precision, {})[0]])

    def index(self, language: str | None) -> int:
        """The number of a language; UserError if the model doesn't know it."""
        if language not in self.languages:
            raise UserError(
                f"language {language!r}: the model at {self.path} knows {', '.join(self.languages)}; name one of them"
            )
        return self.languages.index(language)

    @torch.no_grad()
    def surprisals(self, batch: Batch) -> torch.Tensor:
        """The surprisal of each predicted piece in nats, (rows, masked) fp32."""
        return self.encoder(batch.to(self.device))[1].cpu()

    def summed(self, values: Sequence[float]) -> list[float]:
        """Returns the sums over all data-parallel ranks."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(value) / self.layout.tensor for value in total]


class Text:
    """A text file with the methods of a corpus that `mlinterf_ds.data.evaluation` calls: one language, one split."""

    def __init__(self, path: Path, language: str, tokenizer: Tokenizer):
        self.languages, self.vocabulary = [language], tokenizer.vocabulary
        text = read_text(path)
        check_running_text(str(path), text[:START].encode())
        self.lines = [line for line in map(normalise, lines_of(text)) if line]
        if not self.lines:
            raise UserError(f"{path}: no sentence in it; expected one a line")
        self.encoded = [tokenizer.encode(line) for line in self.lines]
        self.flat = np.array([piece for ids in self.encoded for piece in (*ids, self.vocabulary.eos)], dtype=np.int64)

    def sentences(self, language: str, split: str) -> int:
        return len(self.lines)

    def characters(self, language: str, split: str) -> int:
        return sum(map(len, self.lines))

    def tokens(self, language: str, split: str) -> np.ndarray:
        return self.flat

    def unchanged(self, language: str, split: str) -> bool:
        return True

    def starts_document(self, language: str, split: str, offsets: np.ndarray) -> np.ndarray:
        return np.ones(len(offsets), dtype=bool)  # each line stands alone


def score(model: Model, language: str, path: Path, sentences: int) -> dict[str, float]:
    """Perplexity, bits per character and pseudo-perplexity (of the first `sentences` lines) of a text file."""
    number, text = model.index(language), Text(path, language, model.tokenizer)
    layout = model.layout
    rows = EvaluationSet(text, language, "test", languages=model.languages, row_format=model.row_format)
    bar = partial(tqdm, disable=None if layout.rank == 0 else True, leave=False)  # None: shown on a terminal only
    batches = rows.batches(ROWS, layout.data_rank, layout.data)
    shown = bar(batches, f"{language}: perplexity", -(-rows.rows // (ROWS * layout.data)))
    nll = weighted_loss(model.encoder, shown, model.device, layout)
    scores = {
        "perplexity": math.exp(nll),
        "bits_per_character": rows.bits_per_character(nll),
        "sentences": len(text.lines),
        "unknown": float(np.mean(text.flat == text.vocabulary.unk)),
    }
    if old := model.saved.get("old_pieces"):
        scores |= among_old_pieces(model, rows, old)
    if sentences:
        sums, part = np.zeros(2), text.encoded[:sentences][layout.data_rank :: layout.data]
        for ids in bar(part, f"{language}: pseudo-perplexity"):
            for batch in one_at_a_time(ids[: model.length - 2], number, model.tokenizer.vocabulary):
                sums += float(model.surprisals(batch).sum()), len(batch.tokens)
        nll, count = model.summed(sums.tolist())
        cut = sum(len(ids) > model.length - 2 for ids in text.encoded[:sentences])
        scores |= {
            "pseudo_perplexity": math.exp(nll / count),
            "pseudo_perplexity_tokens": count,
            "pseudo_perplexity_sentences_cut": cut,
        }
    return scores


def among_old_pieces(model: Model, rows: EvaluationSet, old: int) -> dict[str, float]:
    """The perplexity of predictions among the first `old` pieces, those of the model that this one extends.

    "old_pieces" is the share of the predictions that ask for an old piece; the others are left out.
    """
    layout, kept = model.layout, 0.0

    def batches() -> Iterator[Batch]:
        nonlocal kept
        for batch in rows.batches(ROWS, layout.data_rank, layout.data):
            weights = batch.weights * (batch.labels < old)
            kept += float(weights.sum())
            yield replace(batch, weights=weights)

    with model.encoder.head.among_first(old):
        nll = weighted_loss(model.encoder, batches(), model.device, layout)
    (share,) = model.summed([kept])
    return {"old_pieces_perplexity": math.exp(nll / share), "old_pieces": share} if share else {"old_pieces": 0.0}


def record(model: Model, texts: dict[str, str], results: dict[str, dict[str, float]]) -> None:
    """Log the scores to MLflow, in a run nested under the pretraining run, where that was tracked."""
    tracker = Tracker.start(
        enabled=True,
        experiment=f"{model.saved['config']['tracking']['experiment']}-analyses",
        name="evaluate",
        folder=Path(f"runs/evaluate-{time.strftime('%Y%m%d-%H%M%S')}"),
        parameters={"checkpoint": str(model.path), "text": texts},
        tags=environment_facts() | {"variant": model.saved["config"]["variant"]},
        parent_id=model.saved.get("run_id"),
        about=f"Evaluation of {model.path} on {', '.join(texts)}",
        datasets=[dataset(Path(path), sha256(Path(path)), "evaluation") for path in texts.values()],
    )
    for language, scores in results.items():
        tracker.log({f"evaluate/{name}/{language}": value for name, value in scores.items()}, 0)
    tracker.close()


def one_at_a_time(ids: Sequence[int], language: int, vocabulary: Vocabulary) -> Iterator[Batch]:
    """The rows `<s> sentence </s>`, one for each token of the sentence, in which that token is masked."""
    sentence = torch.tensor([vocabulary.bos, *ids, vocabulary.eos])
    for first in range(0, len(ids), ROWS):
        columns = torch.arange(first, min(first + ROWS, len(ids)))[:, None] + 1
        tokens = sentence.repeat(len(columns), 1)
        masked, labels = tokens.scatter(1, columns, vocabulary.mask), tokens.gather(1, columns)
        languages = torch.full((len(tokens),), language)
        yield Batch(masked, columns, labels, torch.ones(columns.shape), languages, (language,), 0)


def masked_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The row `<s> text </s>` of a text in which BLANK stands for masks."""
    *before, last = text.split(BLANK)
    # No piece stands for a space before a mask: in training the space belongs to the word that is masked.
    first, *others = *(part.rstrip() for part in before), last
    vocabulary = tokenizer.vocabulary
    behind = [piece for part in others for piece in (vocabulary.mask, *tokenizer.encode_on(part))]
    return [vocabulary.bos, *tokenizer.encode(first), *behind, vocabulary.eos]


@torch.no_grad()
def fill(model: Model, text: str, language: str | None, top: int) -> list[list[dict[str, Any]]]:
    """Returns the likeliest pieces for each `<mask>` of the text, best first: [{"piece", "probability"}]."""
    if BLANK not in text:
        raise UserError(f"--fill {text!r}: has no {BLANK}")
    number = model.index(language)
    vocabulary, ids = model.tokenizer.vocabulary, masked_ids(model.tokenizer, text)
    if len(ids) > model.length:
        raise UserError(f"--fill: {len(ids)} pieces, the model reads {model.length} at once: shorten the text")
    tokens = torch.tensor([ids], device=model.device)
    hidden = model.encoder.hidden(tokens, torch.tensor([number]), (number,))
    chances = model.encoder.logits(hidden)[0].softmax(-1).cpu()
    pieces = model.tokenizer.pieces
    best = chances[[column for column, piece in enumerate(ids) if piece == vocabulary.mask]].topk(min(top, len(pieces)))
    return [
        [{"piece": pieces[i], "probability": p} for p, i in zip(*candidates, strict=True)]
        for candidates in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def _shown(results: Any) -> str:
    if isinstance(results, list):
        lines = []
        for number, candidates in enumerate(results, 1):
            lines.append(f"{BLANK} {number}:")
            lines += [f"  {c['probability']:>7.2%}  {c['piece'].replace(chr(0x2581), '_')}" for c in candidates]
        return "\n".join(lines)
    lines = [f"{'language':<12}{'perplexity':>12}{'bits/character':>16}{'pseudo-perplexity':>19}{'sentences':>11}"]
    for language, scores in results.items():
        pseudo = f"{scores['pseudo_perplexity']:.2f}" if "pseudo_perplexity" in scores else "-"
        lines.append(
            f"{language:<12}{scores['perplexity']:>12.2f}{scores['bits_per_character']:>16.3f}{pseudo:>19}{scores['sentences']:>11}"
        )
        if scores["unknown"] >= MANY_UNKNOWN:
            lines.append(
                f"note: {scores['unknown']:.0%} of the pieces of {language} are <unk>, not in the vocabulary: its figures "
                "say little"
            )
        if "old_pieces_perplexity" in scores:
            lines.append(
                f"note: {language}: perplexity {scores['old_pieces_perplexity']:.2f} among the pieces of the model that this one "
                f"extends ({scores['old_pieces']:.1%} of the predictions); the rest of the perplexity is due to the new pieces"
            )
        if cut := scores.get("pseudo_perplexity_sentences_cut"):
            lines.append(
                f"note: pseudo-perplexity reads only the beginning of {cut} sentences of {language}: longer than a row"
            )
    return "\n".join(lines)

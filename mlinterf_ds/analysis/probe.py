"""What the frozen encoder knows without fine-tuning, layer by layer: cheap, and with a small spread over seeds.

- Probes: a linear classifier of parts of speech and one of named entities, fitted to the states of the first language and tested
  on all: the others' scores are zero-shot. Floors: the commonest tag, and each word's commonest tag (lexical).
- Retrieval: the share of parallel sentences whose translation is nearest (CSLS), both ways. Floor: chance.
- Alignment: words that are each other's nearest, against the synthetic languages' known alignment. Floor: the diagonal.

A word's state is the mean over its pieces, a sentence's the mean over its words. The embeddings' own column shows what words say
without context. Floors and scores are in percent.

<output>/probe.png/.svg/.csv    measure by language by layer, beside the floors
<output>/probe.md               the last layer's scores beside the floors
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from mlinterf_ds.analysis.config import ProbeTask
from mlinterf_ds.analysis.job import AnalysisJob
from mlinterf_ds.data import synthetic
from mlinterf_ds.data.tokenizer import lines_of, normalise
from mlinterf_ds.engine.precision import DTYPES
from mlinterf_ds.errors import UserError
from mlinterf_ds.files import markdown_table, write_text
from mlinterf_ds.plots.heatmaps import heatmaps
from mlinterf_ds.tasks import TASKS
from mlinterf_ds.tasks.files import read_text
from mlinterf_ds.tasks.tagging import Tagger

ROWS = 64  # sentences encoded at once
PENALTY = 0.01  # of the ridge, in variances of a feature
NEIGHBOURS = 10  # over which CSLS takes its means (Conneau et al., 2018)
METRICS = {"pos": "accuracy", "ner": "f1"}
FLOOR, LEXICAL, EMBEDDINGS = "floor", "lexical", "embeddings"
Array = NDArray[Any]
Links = set[tuple[int, int]]  # (word of the left sentence, word of the right one)
Scores = dict[str, dict[str, dict[str, float]]]  # measure -> language -> column -> percent
States = list[Array]  # of each sentence (layers + 1, words, width) fp32: embeddings, then every layer's output


def run(job: AnalysisJob) -> dict[str, Any]:
    """Probes the checkpoint and returns the summary. All ranks encode; the first one writes."""
    notes: list[str] = []
    frozen = Frozen(job, notes)
    scores: Scores = {}
    for name in METRICS:
        scores |= probed(job, frozen, name, notes)
    scores |= translated(job, frozen, notes)
    if not scores:
        raise UserError("nothing to probe: " + "; ".join(notes))
    columns = [FLOOR, LEXICAL, *frozen.layers]
    if job.first:
        write(job, scores, columns, notes)
    return {
        "analysis": "probe",
        "checkpoint": str(job.model.path),
        "step": job.model.step,
        "source": job.languages[0],
        "languages": list(job.languages),
        "precision": job.precision,
        "columns": columns,
        "scores": scores,
        "notes": notes,
    }


def write(job: AnalysisJob, scores: Scores, columns: Sequence[str], notes: Sequence[str]) -> None:
    """The figure with its table, the last layer's scores as Markdown, on screen and as metrics."""
    panels = {
        measure: np.array([[of.get(code, {}).get(name, np.nan) for name in columns] for code in job.languages])
        for measure, of in scores.items()
    }
    title = f"Frozen states: probes of {job.languages[0]} on all languages, retrieval, alignment"
    caption = "; ".join([job.described, *notes])
    heatmaps(
        panels, job.languages, columns, job.output / "probe.png", title=title, label="percent", caption=caption, form=".0f"
    )  # fmt: skip
    last = [(f"probe/{measure}/{code}", row[columns[-1]]) for measure, of in scores.items() for code, row in of.items()]
    job.log(dict(last), job.model.step)
    text = shown(scores, columns, notes)
    write_text(job.output / "probe.md", text)
    print(text, flush=True)


def shown(scores: Scores, columns: Sequence[str], notes: Sequence[str]) -> str:
    """The last layer's scores beside their floors, as Markdown."""
    rows = [
        [
            measure,
            code,
            *(f"{row[name]:.1f}" if name in row else "" for name in (columns[-1], EMBEDDINGS, LEXICAL, FLOOR)),
        ]
        for measure, of_measure in scores.items()
        for code, row in of_measure.items()
    ]
    head = ["measure", "language", "last layer", "embeddings", "lexical", "floor"]
    return "\n".join([*markdown_table(head, rows), "", *notes]) + "\n"


class Frozen:
    """The checkpoint's encoder, which gives the states of words. Each data-parallel rank encodes its share of the sentences."""

    def __init__(self, job: AnalysisJob, notes: list[str]):
        self.job, self.notes, self.tokenizer = job, notes, job.model.tokenizer()
        self.encoder = job.model.encoder(job.layout, job.device, DTYPES[job.precision])
        self.layers = [EMBEDDINGS, *(f"layer {k + 1}" for k in range(len(self.encoder.block.layers)))]

    def _pieces(self, words: Sequence[str]) -> list[list[int]]:
        """The pieces of each word; a word of none has one `<unk>`."""
        return [of_word or [self.tokenizer.vocabulary.unk] for of_word in self.tokenizer.encode_sentence(words)]

    def kept(self, examples: Sequence[Any], sides: str) -> list[int]:
        """The numbers of the examples whose sentences (each a list of words) all fit; the others are counted in the notes."""
        room = self.job.model.positions - 2
        fitting = ([0 < sum(map(len, self._pieces(words))) <= room for words in sentences] for sentences in examples)
        numbers = [number for number, of_sides in enumerate(fitting) if all(of_sides)]
        if lost := len(examples) - len(numbers):
            self.notes.append(f"{sides}: {lost} of {len(examples)} sentences are empty or longer than a row: left out")
        return numbers

    def states(self, sentences: Sequence[Sequence[str]], language: str) -> States:
        """The states of the words of each sentence, the same on every rank."""
        layout = self.job.layout
        own: dict[int, Array] = {}
        for first in range(layout.data_rank * ROWS, len(sentences), layout.data * ROWS):
            own |= dict(enumerate(self._encoded(sentences[first : first + ROWS], language), first))
        parts: list[dict[int, Array]] = [own]
        if layout.world > 1:
            parts = [{}] * layout.world
            dist.all_gather_object(parts, own if layout.tensor_rank == 0 else {})
        return [states for _, states in sorted((item for part in parts for item in part.items()), key=itemgetter(0))]

    @torch.no_grad()
    def _encoded(self, sentences: Sequence[Sequence[str]], language: str) -> States:
        special, number = self.tokenizer.vocabulary, self.job.model.languages.index(language)
        pieces = [self._pieces(words) for words in sentences]
        rows = [[special.bos, *(id for of_word in of_row for id in of_word), special.eos] for of_row in pieces]
        tokens = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=special.pad)
        lengths = torch.tensor([[len(row)] for row in rows])
        padding = torch.arange(tokens.shape[1]) >= lengths
        languages = torch.full((len(rows),), number)
        layers: list[torch.Tensor] = []
        hooks = [
            module.register_forward_hook(lambda _module, _inputs, output: layers.append(output))
            for module in (self.encoder.embeddings, *list(self.encoder.block.layers)[:-1])
        ]
        last = self.encoder.hidden(tokens.to(self.job.device), languages, (number,), padding.to(self.job.device))
        for hook in hooks:
            hook.remove()
        states = torch.stack([*layers, last]).float().cpu().numpy()  # (layers + 1, rows, length, width)
        counts = [np.array([len(of_word) for of_word in of_row]) for of_row in pieces]
        return [
            np.add.reduceat(states[:, row, 1 : 1 + count.sum()], count.cumsum() - count, axis=1) / count[:, None]
            for row, count in enumerate(counts)
        ]


# -- probes -------------------------------------------------------------------------------------------------------------
def probed(job: AnalysisJob, frozen: Frozen, name: str, notes: list[str]) -> Scores:
    """A task's scores on every language that has examples; {} where the first language has none to fit the probe to."""
    task, settings = TASKS[name], getattr(job.config.probe, name)
    assert isinstance(task, Tagger)
    train, tests = examples_of(job, task, settings, notes)
    if not train:
        return {}

    def read(examples: list[Any], code: str, split: str) -> tuple[list[Any], States]:
        """Those of the examples that fit into a row, and their frozen states."""
        kept = [examples[k] for k in frozen.kept([[example.words] for example in examples], f"{name} {split} {code}")]
        if not kept:
            raise UserError(
                f"probe.{name}: no {split} sentence of {code} fits into a row of the model: give shorter ones"
            )
        return kept, frozen.states([example.words for example in kept], code)

    train, states = read(train, job.languages[0], "train")
    by_set = {code: read(test, code, "test") for code, test in tests.items()}
    labels, gold = task.labels(train), task.gold(train)
    classes = np.array([labels.index(tag) for tags in gold for tag in tags])
    scores: dict[str, dict[str, float]] = {}
    for code, (test, _) in by_set.items():
        floors = task.baselines(train, test)
        scores[code] = {FLOOR: floors["majority"][METRICS[name]], LEXICAL: floors["lexical"][METRICS[name]]}
    for layer, column in enumerate(frozen.layers):
        probe = Probe.fitted(np.concatenate([of[layer] for of in states]), classes, len(labels))
        for code, (test, of_test) in by_set.items():
            tags = [[labels[k] for k in probe.classes(of[layer])] for of in of_test]
            scores[code][column] = task.score(test, tags)[METRICS[name]]
    return {f"{name} {METRICS[name]}": scores}


def examples_of(
    job: AnalysisJob, task: Tagger, settings: ProbeTask, notes: list[str]
) -> tuple[list[Any], dict[str, list[Any]]]:
    """The training examples, of the first language, and the test examples by language; empty where there are none.

    Each set comes from its file; a synthetic language without a file gets synthetic examples.
    """
    count = job.config.probe.examples

    def read(file: str | None, code: str, split: str, key: str) -> list[Any]:
        if file:
            return [e for e in task.read(Path(file), code) if task.labelled(e)][:count]
        if synthetic.is_known(code):
            return task.synthetic(code, count, 0, split)
        notes.append(f"{task.name}: no {split} examples of {code} (probe.{task.name}.{key}=FILE gives some)")
        return []

    train = read(settings.train, job.languages[0], "train", "train")
    tests = {code: read(settings.test.get(code), code, "test", f"test.{code}") for code in job.languages}
    return train, {code: test for code, test in tests.items() if test}


# -- parallel sentences -------------------------------------------------------------------------------------------------
def translated(job: AnalysisJob, frozen: Frozen, notes: list[str]) -> Scores:
    """Retrieval of the first language's sentences in each other language, and where it is known the alignment of their words."""
    sentences, alignment = parallel(job, notes)
    source, *others = sentences
    if not others:
        notes.append("no parallel sentences of two languages (probe.parallel.LANG=FILE gives some)")
        return {}
    retrieval: dict[str, dict[str, float]] = {}
    alignments: dict[str, dict[str, float]] = {}
    for code in others:
        pairs = [[left, right] for left, right in zip(sentences[source], sentences[code], strict=True)]
        numbers = distinct(pairs, frozen.kept(pairs, f"parallel {source}-{code}"), f"{source}-{code}", notes)
        left, right = (frozen.states([sentences[name][k] for k in numbers], name) for name in (source, code))
        retrieval[code] = {FLOOR: 100 / len(numbers)}
        for layer, column in enumerate(frozen.layers):
            vectors = (np.stack([states[layer].mean(0) for states in side]) for side in (left, right))
            retrieval[code][column] = float(np.mean(retrieved(*vectors)))
        if code in alignment:
            gold = [alignment[code][k] for k in numbers]
            places = [diagonal(a.shape[1], b.shape[1]) for a, b in zip(left, right, strict=True)]
            alignments[code] = {FLOOR: f1(zip(places, gold, strict=True))}
            for layer, column in enumerate(frozen.layers):
                links = [linked(a[layer], b[layer]) for a, b in zip(left, right, strict=True)]
                alignments[code][column] = f1(zip(links, gold, strict=True))
    return {"retrieval": retrieval} | ({"alignment f1": alignments} if alignments else {})


def distinct(pairs: Sequence[Sequence[Any]], numbers: Sequence[int], name: str, notes: list[str]) -> list[int]:
    """The numbers of the pairs neither side of which occurs twice: of two equal sentences none is the wrong one."""
    seen: list[Counter[tuple[str, ...]]] = [Counter(tuple(pairs[k][side]) for k in numbers) for side in (0, 1)]
    once = [k for k in numbers if all(seen[side][tuple(pairs[k][side])] == 1 for side in (0, 1))]
    if lost := len(numbers) - len(once):
        notes.append(f"parallel {name}: {lost} of {len(numbers)} pairs have a sentence that another has too: left out")
    if len(once) < 2:
        raise UserError(f"probe.parallel: {name} has {len(once)} distinct pairs that fit into a row: give more")
    return once


def parallel(job: AnalysisJob, notes: list[str]) -> tuple[dict[str, list[Sequence[str]]], dict[str, list[Links]]]:
    """The words of parallel sentences by language, the source's first; and, for languages whose alignment with it is known, that alignment."""
    settings, (source, *others) = job.config.probe, job.languages
    if settings.parallel:
        if missing := [code for code in settings.parallel if code not in job.languages]:
            raise UserError(
                f"probe.parallel: {', '.join(missing)} is not analysed; languages are {', '.join(job.languages)}"
            )
        named = [code for code in job.languages if code in settings.parallel]
        return read_parallel(settings.parallel, named, settings.sentences), {}
    codes = [code for code in (source, *others) if synthetic.is_known(code)]
    if source not in codes or len(codes) < 2:
        return {source: []}, {}
    made = list(synthetic.parallel(codes, settings.sentences, seed=0))
    words: dict[str, list[Sequence[str]]] = {
        code: [[token.form for token in of[k]] for of in made] for k, code in enumerate(codes)
    }
    return words, {code: [synthetic.aligned(of[0], of[k]) for of in made] for k, code in enumerate(codes) if k}


def read_parallel(files: Mapping[str, str], codes: Sequence[str], count: int) -> dict[str, list[Sequence[str]]]:
    """The words of the first `count` lines of each language's file. UserError if their numbers of lines differ."""
    lines = {}
    for code in codes:
        text = lines_of(read_text(Path(files[code])))
        if not text[-1]:  # behind the end of the last line
            text.pop()
        lines[code] = [normalise(line).split() for line in text]
    if len({len(of_file) for of_file in lines.values()}) > 1:
        counted = ", ".join(f"{files[code]} has {len(of_file)}" for code, of_file in lines.items())
        raise UserError(f"probe.parallel: the files are not parallel line by line: {counted} lines")
    return {code: list(of_file[:count]) for code, of_file in lines.items()}


# -- scores of states: each has a closed form or is a count, so that nothing is drawn at random and no step size is chosen --------
@dataclass(frozen=True)
class Probe:
    """A linear classifier of states: ridge regression of the classes' indicators on standardised features."""

    mean: Array  # (width,)
    scale: Array  # (width,)
    weights: Array  # (width, classes)
    bias: Array  # (classes,)

    @classmethod
    def fitted(cls, states: Array, classes: Array, count: int) -> Probe:
        """states: (words, width); classes: (words,) numbers below `count`."""
        states, indicators = states.astype(np.float64), np.eye(count)[classes]
        mean, scale = states.mean(0), states.std(0)
        features = (states - mean) / np.where(scale > 0, scale, 1)
        bias = indicators.mean(0)
        gram = features.T @ features + PENALTY * len(features) * np.eye(features.shape[1])
        weights = np.linalg.solve(gram, features.T @ (indicators - bias))
        return cls(mean, np.where(scale > 0, scale, 1), weights, bias)

    def classes(self, states: Array) -> Array:
        """The class of each of the states (words, width)."""
        predicted: Array = ((states - self.mean) / self.scale @ self.weights + self.bias).argmax(-1)
        return predicted


def cosines(left: Array, right: Array) -> Array:
    """(n, m) cosines of left (n, width) and right (m, width)."""
    left, right = (side / np.maximum(np.linalg.norm(side, axis=-1, keepdims=True), 1e-12) for side in (left, right))
    product: Array = left @ right.T
    return product


def csls(similarity: Array, neighbours: int = NEIGHBOURS) -> Array:
    """2 s - r(row) - r(column), where r is the mean over the nearest neighbours: neighbours of all and sundry count for less."""
    k = min(neighbours, *similarity.shape)
    of_rows = np.sort(similarity, axis=1)[:, -k:].mean(1, keepdims=True)
    of_columns = np.sort(similarity, axis=0)[-k:].mean(0, keepdims=True)
    adjusted: Array = 2 * similarity - of_rows - of_columns
    return adjusted


def retrieved(left: Array, right: Array) -> tuple[float, float]:
    """The percentages of sentences whose translation is nearest by CSLS, from left to right and back.

    left, right: (sentences, width); row k of one translates row k of the other.
    """
    similarity = csls(cosines(left, right))
    own = np.arange(len(similarity))
    return float(100 * (similarity.argmax(1) == own).mean()), float(100 * (similarity.argmax(0) == own).mean())


def linked(left: Array, right: Array) -> Links:
    """The pairs of words each of which is the other's nearest by cosine; left: (words, width), right: (words, width)."""
    similarity = cosines(left, right)
    nearest, back = similarity.argmax(1), similarity.argmax(0)
    return {(i, int(j)) for i, j in enumerate(nearest) if back[j] == i}


def diagonal(left: int, right: int) -> Links:
    """The links of words that stand at the same place in both sentences, which have so many words."""
    return {(k, k) for k in range(min(left, right))}


def f1(pairs: Iterable[tuple[Links, Links]]) -> float:
    """F1 in percent of the predicted links against the gold ones, over all sentences together."""
    right = predicted = gold = 0
    for of_sentence, known in pairs:
        right, predicted, gold = right + len(of_sentence & known), predicted + len(of_sentence), gold + len(known)
    return 200 * right / (predicted + gold) if predicted + gold else 0.0

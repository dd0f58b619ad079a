#!/usr/bin/env python
"""Prepares a corpus: turns text files into deduplicated, split, tokenised and memory-mapped token shards.

    python tools/prepare_corpus.py --out corpora/en-sw --vocab-size 8000 en=english.txt sw=swahili.txt.gz

Then train on it: deepspeed launch/pretrain.py --deepspeed_config ds_configs/zero2.json --set corpus=corpora/en-sw
"""

import argparse
import sys
import time
from pathlib import Path

from mlinterf_ds.data.corpus import Corpus
from mlinterf_ds.data.prepare.main import prepare
from mlinterf_ds.errors import UserError, check_surroundings, ready_streams

INPUTS = """\
inputs, as LANGUAGE=INPUT (one language may have several):
  en=FILE       plain text, a sentence a line; .gz, .bz2 and .xz of it; a Wikipedia XML dump, or WikiExtractor's output
  en=FOLDER     all files in the folder, in name order
  en=-          standard input
  en=hf:NAME[:CONFIG[:SPLIT[:COLUMN]]]    a Hugging Face dataset (needs the library `datasets` and a network)

After an interruption the same command goes on from there. A language needs at least 50 distinct sentences.
"""


def main(arguments: list[str] | None = None) -> int:
    ready_streams()
    options = _parser().parse_args(arguments)
    started = time.perf_counter()
    try:
        check_surroundings()
        corpus = prepare(
            _inputs_by_language(options.inputs),
            options.out,
            vocabulary_size=options.vocab_size,
            temperature=options.vocab_temperature,
            tokenizer=options.tokenizer,
            extends=options.extend,
            limits=_limits(options.limit),
            halves=_halves(options.halve),
            licence=options.licence,
            meta_split=options.meta_split,
            workers=options.workers,
        )
        print(report(corpus, time.perf_counter() - started), flush=True)
        return 0
    except UserError as error:
        print(f"prepare_corpus: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prepare_corpus: interrupted; run the same command again to go on from here", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prepare_corpus.py",
        description="Clean, deduplicate, split and tokenise text in one or many languages for pretraining.",
        epilog=INPUTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("inputs", nargs="+", metavar="LANGUAGE=INPUT", help="the text of a language; see below")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="FOLDER", help="a new or empty folder for the corpus"
    )
    vocabulary = parser.add_mutually_exclusive_group()
    vocabulary.add_argument(
        "--vocab-size",
        type=int,
        default=32_000,
        metavar="N",
        help="size of the shared vocabulary in pieces (default: 32000)",
    )
    vocabulary.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="use this vocabulary, ids and all: a corpus (so that perplexities can be compared), its tokenizer.model, or the "
        "folder of a model of transformers, from which training then starts (init=)",
    )
    parser.add_argument(
        "--extend",
        type=Path,
        metavar="FOLDER",
        help="keep the vocabulary of this corpus, ids and all, and extend it to --vocab-size with pieces of the languages "
        "that it lacks, so that a model trained on it can learn them (init=); the old text may be cut differently where a "
        "new piece spans several old ones. Or the folder of a model of transformers: it gets pieces of the scripts that its "
        "vocabulary lacks, and text in others keeps its ids",
    )
    parser.add_argument(
        "--vocab-temperature",
        type=float,
        default=2.0,
        metavar="T",
        help="a language weighs sentences^(1/T) when the vocabulary is learned: 1 is proportional to its size, higher "
        "values favour small languages (default: 2)",
    )
    parser.add_argument(
        "--limit",
        action="append",
        default=[],
        metavar="LANGUAGE=N",
        help="keep only N of the language's training sentences (a low-resource version); the held-out splits stay the same",
    )
    parser.add_argument(
        "--halve",
        action="append",
        default=[],
        metavar="LANGUAGE=NEW",
        help="split the text of a language in two without a common sentence, by the hash of the line or document: the language "
        "keeps one half, the new code gets the other (a null control: a pair that is one language)",
    )
    parser.add_argument(
        "--meta-split",
        action="store_true",
        help="hold 2%% of each language's text out for the validation loss of the meta step (meta.text=held_out); by default "
        "it reads training text",
    )
    parser.add_argument(
        "--licence", default="", metavar="TEXT", help="a note on the texts' licences, stored in the manifest"
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="number of processes (default: one a core); the result is the same for any number",
    )
    return parser


def _inputs_by_language(arguments: list[str]) -> dict[str, list[str | Path]]:
    inputs: dict[str, list[str | Path]] = {}
    for argument in arguments:
        language, equals, name = argument.partition("=")
        if not equals or not name:
            raise UserError(f"{argument!r}: expected LANGUAGE=INPUT, for example en=english.txt")
        inputs.setdefault(language, []).append(name)
    return inputs


def _limits(arguments: list[str]) -> dict[str, int]:
    """Parses the arguments of `--limit`, LANGUAGE=N each: the training sentences that a language keeps."""
    limits: dict[str, int] = {}
    for argument in arguments:
        language, _, number = argument.partition("=")
        if not number.isdecimal() or language in limits:
            raise UserError(f"--limit {argument}: expected LANGUAGE=N once for a language, for example fr=10000")
        limits[language] = int(number)
    return limits


def _halves(arguments: list[str]) -> dict[str, str]:
    """Parses the arguments of `--halve`, LANGUAGE=NEW each: {new code: language}."""
    halves: dict[str, str] = {}
    for argument in arguments:
        language, _, new = argument.partition("=")
        if not new or new in halves:
            raise UserError(f"--halve {argument}: expected LANGUAGE=NEW, each code once, for example en=en-b")
        halves[new] = language
    return halves


def report(corpus: Corpus, seconds: float) -> str:
    """Returns a table of what the corpus holds, the lines that were dropped, and a summary line."""
    rows: list[tuple[str, ...]] = [("language", "sentences", "train", "words", "tokens", "unknown", "tokens/word")]
    for language in corpus.languages:
        splits = corpus.manifest["languages"][language]["splits"]
        total = {name: sum(s[name] for s in splits.values()) for name in ("sentences", "words", "tokens")}
        pieces = total["tokens"] - total["sentences"]  # the </s> of every sentence belongs to no word
        counts = (total["sentences"], splits["train"]["sentences"], total["words"], total["tokens"])
        rates = (f"{corpus.unknown(language):.3%}", f"{pieces / total['words']:.2f}")
        rows.append((language, *(f"{count:,}" for count in counts), *rates))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    for language in corpus.languages:
        for reason, entry in corpus.manifest["languages"][language]["dropped"].items():
            first = f" (first: {', '.join(entry['first'])})" if entry["first"] else ""
            lines.append(f"{language}: dropped {entry['lines']:,} {reason}{first}")
    sources = [source for code in corpus.languages for source in corpus.manifest["languages"][code]["sources"]]
    read = sum(source.get("bytes", 0) for source in sources)
    lines.append(
        f"{corpus.folder}: {len(corpus.languages)} languages, {corpus.vocabulary_size:,} pieces, {read / 1e6:.1f} MB read "
        f"in {seconds:.1f} s"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

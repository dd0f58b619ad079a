#!/usr/bin/env python
"""Fetches public text and task data for the studies of the paper's languages, and writes the recipes that read them.

    python tools/get_data.py --list                  # each set, its licence and its address; fetches nothing
    python tools/get_data.py --out data              # text of nine languages, and four tasks
    python launch/study.py --recipe data/study_real.toml --dry-run

Files that are there already are kept, so that the same command goes on after an interruption. Without a network, bring the
files that a message names into OUT/downloads by other means and start it again. Read the licences: some sets exclude commercial use.
"""

from __future__ import annotations

import argparse
import bz2
import csv
import http.client
import io
import json
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mlinterf_ds.errors import UserError, refusing
from mlinterf_ds.files import replacing, sha256, write_json, write_text
from mlinterf_ds.runtime.program import main as run_command

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = "../shared/data"  # where the shipped recipes look for the data
RECIPES = ("study_real", "study_gpu")
TEXT = ("en", "ar", "fr", "ru", "hi", "sw", "te", "mr", "kn")
TASKS = ("en", "ar", "fr", "ru", "hi", "sw", "te")
# Wikimedia answers 403 to clients that do not say what they are (https://meta.wikimedia.org/wiki/User-Agent_policy).
AGENT = {"User-Agent": "mlinterf_ds-get_data/1.0 (fetches the beginning of dumps for research)"}
UD = "https://raw.githubusercontent.com/UniversalDependencies"
SPLITS = ("train", "dev", "test")
# Files of the recipe: folder or file -> repository, files and splits of a treebank.
TREEBANKS = {
    "two_column/en_ewt": ("UD_English-EWT", "en_ewt", SPLITS),
    "two_column/fr_gsd": ("UD_French-GSD", "fr_gsd", SPLITS),
    "two_column/ar_padt": ("UD_Arabic-PADT", "ar_padt", SPLITS),
    "ud/te_mtg": ("UD_Telugu-MTG", "te_mtg", SPLITS),
    "ud/ru_taiga": ("UD_Russian-Taiga", "ru_taiga", SPLITS[1:]),
    "ud/hi_pud": ("UD_Hindi-PUD", "hi_pud", SPLITS[2:]),
}
TYDIQA_LANGUAGES = {"en": "english", "sw": "swahili"}


@dataclass(frozen=True)
class DataSet:
    """A public data set: what it is, its licence, and its files by the name under which they are kept in `downloads`."""

    name: str
    what: str
    licence: str
    files: dict[str, str]  # file name -> address


DATA_SETS = (
    DataSet(
        "text", "the first articles of nine Wikipedias", "CC BY-SA 4.0",
        {
            f"{code}wiki.xml.bz2": f"https://dumps.wikimedia.org/{code}wiki/latest/{code}wiki-latest-pages-articles.xml.bz2"
            for code in TEXT
        },
    ),
    DataSet(
        "ner", "PAN-X (WikiAnn), the splits of Rahimi et al. (2019)", "not stated; the text is Wikipedia's",
        {"panx_dataset.zip": "https://s3.amazonaws.com/datasets.huggingface.co/wikiann/1.1.0/panx_dataset.zip"},
    ),
    DataSet(
        "pos", "Universal Dependencies and MasakhaPOS",
        "EWT, GSD, MTG, Taiga CC BY-SA 4.0; PUD CC BY-SA 3.0; PADT CC BY-NC-SA 3.0; MasakhaPOS MIT (on its page: AFL 3.0)",
        {
            f"{stem}-ud-{split}.conllu": f"{UD}/{repository}/master/{stem}-ud-{split}.conllu"
            for repository, stem, splits in TREEBANKS.values()
            for split in splits
        }
        | {
            f"masakhapos-{split}.txt": f"https://raw.githubusercontent.com/masakhane-io/masakhane-pos/main/data/swa/{split}.txt"
            for split in SPLITS
        },
    ),
    DataSet(
        "qa", "TyDiQA, gold passages", "Apache-2.0",
        {"tydiqa-goldp-train.json": "https://storage.googleapis.com/tydiqa/v1.1/tydiqa-goldp-v1.1-train.json"},
    ),
    DataSet(
        "nli", "XNLI, dev and test sets", "CC BY-NC 4.0",
        {"XNLI-1.0.zip": "https://dl.fbaipublicfiles.com/XNLI/XNLI-1.0.zip"},
    ),
)  # fmt: skip


# --- fetching ----------------------------------------------------------------------------------------------------------
def fetch(address: str, path: Path, mirror: str, megabytes: float | None) -> None:
    """Downloads a file, or its first megabytes, unless it is there. UserError if it cannot be reached or is cut short."""
    if path.is_file():
        return
    actual = f"{mirror.rstrip('/')}/{address.partition('://')[2]}" if mirror else address
    print(f"  {actual}", flush=True)
    left = float("inf") if megabytes is None else megabytes * 1e6
    try:
        request = urllib.request.Request(actual, headers=AGENT)
        with urllib.request.urlopen(request, timeout=60) as answer, replacing(path) as file:
            expected, size = int(answer.headers.get("Content-Length", 0)), 0
            while left > size and (block := answer.read(1 << 20)):
                size += file.write(block)
            if size < min(left, expected):
                raise OSError(f"{size} of {expected} bytes came")
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
        reason = getattr(error, "reason", error)
        raise UserError(
            f"{actual}: cannot be fetched ({reason}); without a network, bring the file to {path} by other means and start again"
        ) from None


# --- preparing ---------------------------------------------------------------------------------------------------------
def prepare_text(downloads: Path, out: Path) -> None:
    """Cuts the beginning of each Wikipedia dump after its last whole article: text/LANG.xml, which a corpus can be made of."""
    for code in TEXT:
        path = downloads / f"{code}wiki.xml.bz2"
        xml = b"".join(_decompressed(path))
        end = xml.rfind(b"</page>")
        if end < 0:
            raise UserError(f"{path}: holds no whole article: remove it and start again, with more --megabytes")
        with replacing(_made(out / "text" / f"{code}.xml")) as file:
            file.write(xml[: end + len(b"</page>")] + b"\n</mediawiki>\n")


def _decompressed(path: Path) -> Iterator[bytes]:
    """The contents of a bz2 file, whose end may be missing: it may hold several streams, one after the other."""
    data = path.read_bytes()
    while data:
        stream = bz2.BZ2Decompressor()
        yield stream.decompress(data)
        data = stream.unused_data


def prepare_ner(downloads: Path, out: Path) -> None:
    """Removes the language from the words of PAN-X: tasks/ner/panx/LANG/SPLIT.tsv."""
    with zipfile.ZipFile(downloads / "panx_dataset.zip") as archive:
        for code in (*TASKS, "mr"):
            member = next(name for name in archive.namelist() if name.rpartition("/")[2] == f"{code}.tar.gz")
            with tarfile.open(fileobj=io.BytesIO(archive.read(member))) as files:
                for split in SPLITS:
                    lines = _member(files, split).read().decode().split("\n")
                    text = "\n".join(line.removeprefix(f"{code}:") for line in lines)
                    write_text(out / "tasks" / "ner" / "panx" / code / f"{split}.tsv", text)


def _member(files: tarfile.TarFile, name: str) -> BinaryIO:
    for member in files.getmembers():
        if Path(member.name).name == name and (file := files.extractfile(member)):
            return file  # type: ignore[return-value]
    raise KeyError(name)


def prepare_pos(downloads: Path, out: Path) -> None:
    """Two columns of some treebanks, the others as they are: tasks/pos/..."""
    folder = out / "tasks" / "pos"
    for place, (_, stem, splits) in TREEBANKS.items():
        for split in splits:
            name = f"{stem}-ud-{split}.conllu"
            text = _tagged(downloads / name, columns=10)
            if place.startswith("two_column"):
                write_text(folder / place / f"{split}.txt", "\n".join(_two_columns(text.split("\n"))) + "\n")
            else:
                write_text(folder / "ud" / name, text)
    for split in SPLITS:
        text = _tagged(downloads / f"masakhapos-{split}.txt", columns=2)
        write_text(folder / "two_column" / "sw_masakhapos" / f"{split}.txt", text)


def _tagged(path: Path, columns: int) -> str:
    """The text of a file of tagged words. ValueError if most of its lines have another number of columns, as a page of HTML has."""
    text = path.read_text(encoding="utf-8")
    lines = [line for line in text.split("\n") if line.strip() and not line.startswith("#")]
    if 2 * sum(len(line.split("\t" if columns > 2 else None)) == columns for line in lines) <= len(lines):
        raise ValueError(f"{path.name} has no lines of {columns} columns")
    return text


def _two_columns(lines: Iterable[str]) -> Iterator[str]:
    """`word tag` of the words of CoNLL-U lines; contractions (1-2) and empty words (1.1) are no words of their own."""
    for line in lines:
        columns = line.split("\t")
        if len(columns) == 10 and columns[0].isdecimal():
            yield f"{columns[1].replace(' ', '_')} {columns[3]}"
        elif not line.strip():
            yield ""


def prepare_qa(downloads: Path, out: Path) -> None:
    """The questions of each language, whose name their ids begin with: tasks/qa/tydiqa_goldp/LANG/train.json."""
    articles = json.loads((downloads / "tydiqa-goldp-train.json").read_bytes())["data"]
    for code, language in TYDIQA_LANGUAGES.items():
        chosen = [a for a in articles if a["paragraphs"][0]["qas"][0]["id"].startswith(f"{language}-")]
        if not chosen:
            raise ValueError(f"no question in {language}")
        path = _made(out / "tasks" / "qa" / "tydiqa_goldp" / code / "train.json")
        write_json(path, {"version": "TyDiQA-GoldP-1.1", "data": chosen})


def prepare_nli(downloads: Path, out: Path) -> None:
    """Premise, hypothesis and label of each language: tasks/nli/xnli/LANG/SPLIT.tsv."""
    with zipfile.ZipFile(downloads / "XNLI-1.0.zip") as archive:
        for split in SPLITS[1:]:
            member = next(
                name for name in archive.namelist() if name.endswith(f"/xnli.{split}.tsv") and "MACOSX" not in name
            )
            text = io.StringIO(archive.read(member).decode("utf-8"))
            rows = list(csv.DictReader(text, delimiter="\t", quoting=csv.QUOTE_NONE))
            for code in TASKS:
                lines = [
                    "\t".join((row["sentence1"], row["sentence2"], row["gold_label"]))
                    for row in rows
                    if row["language"] == code
                ]
                if lines:  # XNLI has no Telugu
                    write_text(out / "tasks" / "nli" / "xnli" / code / f"{split}.tsv", "\n".join(lines) + "\n")


PREPARE = {"text": prepare_text, "ner": prepare_ner, "pos": prepare_pos, "qa": prepare_qa, "nli": prepare_nli}


def _made(path: Path) -> Path:
    """The path, whose parent folder exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


# --- the command -------------------------------------------------------------------------------------------------------
def write_recipes(out: Path) -> list[Path]:
    """The shipped recipes of studies on real text, with the paths of these data."""
    paths = [out / f"{name}.toml" for name in RECIPES]
    for path in paths:
        text = (ROOT / "launch" / "recipes" / path.name).read_text(encoding="utf-8")
        for code in TEXT:
            text = text.replace(
                f'"{SHIPPED}/text/{code}.txt"', json.dumps(f"{out}/text/{code}.xml", ensure_ascii=False)
            )
        text = text.replace(f'"{SHIPPED}/', json.dumps(f"{out}/", ensure_ascii=False)[:-1])
        write_text(path, text)
    return paths


def main(words: Sequence[str]) -> int:
    """Fetches what the command line asks for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder of the data (default: data)")
    parser.add_argument("--only", choices=sorted(PREPARE), nargs="+", default=sorted(PREPARE), help="some of the sets")
    parser.add_argument("--list", action="store_true", help="show sets, licences and addresses, and fetch nothing")
    parser.add_argument(
        "--megabytes",
        type=float,
        default=20,
        help="read of each Wikipedia dump, compressed (default 20: some 10,000 articles)",
    )
    parser.add_argument("--mirror", default="", metavar="URL", help="fetch URL/HOST/PATH in place of https://HOST/PATH")
    options = parser.parse_args(words)
    if not options.megabytes > 0:
        raise UserError(f"--megabytes {options.megabytes:g}: expected a number above 0")
    downloads, problems = options.out / "downloads", []
    if not options.list:
        try:
            downloads.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{options.out}: cannot be written ({error.strerror}): name another folder, --out FOLDER"
            ) from None
    for data in (data for data in DATA_SETS if data.name in options.only):
        print(f"{data.name}: {data.what}; licence: {data.licence}", flush=True)
        if options.list:
            print("\n".join(f"  {address}" for address in data.files.values()))
            continue
        try:
            for name, address in data.files.items():
                fetch(address, downloads / name, options.mirror, options.megabytes if data.name == "text" else None)
            with refusing(
                f"{downloads}: the files of {data.name} are not what was expected", "; remove them and start again"
            ):
                PREPARE[data.name](downloads, options.out)
            facts = {
                name: {"address": address, "sha256": sha256(downloads / name)} for name, address in data.files.items()
            }
            write_json(options.out / f"{data.name}.json", {"licence": data.licence, "files": facts})
        except (UserError, zipfile.BadZipFile, tarfile.TarError, StopIteration) as error:
            problems.append(f"{data.name}: {error or 'a file is missing in the archive'}")
    if options.list:
        return 0
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if not problems and all((options.out / f"{name}.json").is_file() for name in PREPARE):
        for recipe in write_recipes(options.out):
            print(f"python launch/study.py --recipe {recipe} --dry-run")
    return int(bool(problems))


if __name__ == "__main__":
    run_command(main)

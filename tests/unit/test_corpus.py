"""Preparing and opening a corpus, on inputs of every kind: what is in it is held against the text itself."""

import bz2
import gzip
import hashlib
import io
import lzma
import random
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlinterf_ds.data.corpus import Corpus
from mlinterf_ds.data.prepare import inputs as inputs_module
from mlinterf_ds.data.prepare import stages, vocabulary
from mlinterf_ds.data.prepare.cleaning import SENTENCE_END
from mlinterf_ds.data.prepare.main import prepare
from mlinterf_ds.data.prepare.shards import write_shard
from mlinterf_ds.data.prepare.splits import held_out
from mlinterf_ds.data.tokenizer import EOS, lines_of, normalise
from mlinterf_ds.errors import UserError

Prepared = tuple[Corpus, dict[str, list[str]]]  # a corpus and the lines that it was made from
SPLITS = ("train", "meta", "valid", "test")
TOOL = Path(__file__).parents[2] / "tools" / "prepare_corpus.py"


def some_lines(count: int, seed: int = 0, syllables: str = "ba ko mi tu la ne") -> list[str]:
    """Distinct sentences."""
    draw = random.Random(seed)
    words = ["".join(draw.choices(syllables.split(), k=draw.randint(1, 4))) for _ in range(300)]
    lines: dict[str, None] = {}
    while len(lines) < count:
        lines[" ".join(draw.choices(words, k=draw.randint(3, 9)))] = None
    return list(lines)


def written(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


def texts(corpus: Corpus, language: str, split: str) -> list[str]:
    """The sentences of a split, decoded from its tokens."""
    tokens = corpus.tokens(language, split)
    parts = np.split(tokens, np.flatnonzero(tokens == EOS) + 1)
    assert len(parts.pop()) == 0
    return [corpus.tokenizer.decode(part) for part in parts]


def contents(folder: Path) -> dict[str, bytes]:
    """The corpus proper: all files but the note of where it was made from."""
    assert not (folder / ".work").exists()
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "arguments.json"}


def build(out: Path, size: int = 80, **inputs: Any) -> Corpus:
    """A corpus of one input for each language, made by this process."""
    return prepare({code: [text] for code, text in inputs.items()}, out, vocabulary_size=size, workers=1)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("corpus")
    lines = {"en": some_lines(3000), "sw": some_lines(400, 1, "за ко ли ми")}
    files = {code: written(folder / f"{code}.txt", of) for code, of in lines.items()}
    return build(folder / "out", 200, **files), lines


def test_every_sentence_is_in_one_split_and_reads_back(prepared: Prepared) -> None:
    corpus, lines = prepared
    for language, expected in lines.items():
        found = [sentence for split in SPLITS for sentence in texts(corpus, language, split)]
        assert sorted(found) == sorted(expected)
        order = {line: n for n, line in enumerate(expected)}
        for split in SPLITS:  # within a split, in the order of the input
            numbers = [order[sentence] for sentence in texts(corpus, language, split)]
            assert numbers == sorted(numbers)


def test_counts_are_those_of_the_text(prepared: Prepared) -> None:
    corpus, _ = prepared
    for language in corpus.languages:
        for split in SPLITS:
            text = texts(corpus, language, split)
            assert corpus.sentences(language, split) == len(text)
            assert corpus.characters(language, split) == sum(len(sentence) for sentence in text)
            facts = corpus.manifest["languages"][language]["splits"][split]
            assert facts["words"] == sum(len(sentence.split()) for sentence in text)
            assert facts["tokens"] == len(corpus.tokens(language, split))
            assert facts["tokens"] == sum(len(corpus.tokenizer.encode(sentence)) + 1 for sentence in text)


def test_held_out_shares(prepared: Prepared) -> None:
    corpus, lines = prepared
    for language, of in lines.items():
        for split in ("valid", "test"):
            assert corpus.sentences(language, split) == held_out(len(of))
        assert corpus.sentences(language, "train") == len(of) - 2 * held_out(len(of))
        assert corpus.sentences(language, "meta") == 0, "nothing is held out for it unless asked for"
    assert [held_out(n) for n in (50, 400, 1000, 3000, 10_000, 10**6)] == [5, 40, 50, 60, 200, 10_000]


def test_tokens_are_memory_mapped_flat_and_read_only(prepared: Prepared) -> None:
    tokens = prepared[0].tokens("en", "train")
    assert isinstance(tokens, np.memmap) and tokens.ndim == 1 and tokens.dtype == np.uint16
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 0


def test_open_chooses_languages(prepared: Prepared) -> None:
    folder = prepared[0].folder
    assert Corpus.open(folder).languages == ["en", "sw"]
    chosen = Corpus.open(str(folder), ["sw"])
    assert chosen.languages == ["sw"] and chosen.vocabulary_size == 200
    with pytest.raises(UserError, match="'en': not opened; open are: sw"):
        chosen.tokens("en", "train")
    with pytest.raises(UserError, match="split 'dev': must be one of"):
        chosen.tokens("sw", "dev")
    for languages in (["de"], ["en", "en"], []):
        with pytest.raises(UserError, match="en, sw"):
            Corpus.open(folder, languages)


def test_manifest_hash_and_verify(prepared: Prepared) -> None:
    corpus = prepared[0]
    corpus.verify()
    data = (corpus.folder / "manifest.json").read_bytes()
    assert corpus.manifest_hash == hashlib.sha256(data).hexdigest()
    assert str(corpus.folder.parent).encode() not in data  # no path of this machine


def test_megatron_reads_the_shards(prepared: Prepared) -> None:
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    corpus = prepared[0]
    dataset = indexed.IndexedDataset(str(corpus.folder / "en.train"))
    assert len(dataset) == corpus.sentences("en", "train") == len(dataset.document_indices) - 1
    assert [corpus.tokenizer.decode(row) for row in dataset[:50]] == texts(corpus, "en", "train")[:50]


def test_shards_equal_megatrons_builders_byte_for_byte(tmp_path: Path) -> None:
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    draw = np.random.default_rng(0)
    blocks = []  # each a list of documents, each a list of sentences
    for documents in (3, 0, 2):
        blocks.append(
            [[draw.integers(0, 999, draw.integers(1, 6)) for _ in range(draw.integers(1, 4))] for _ in range(documents)]
        )
    for dtype in (np.uint16, np.int32):
        builder = indexed.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
        for document in (document for block in blocks for document in block):
            builder.add_document(np.concatenate(document), [len(sentence) for sentence in document])
        builder.finalize(str(tmp_path / "theirs.idx"))
        sentences = [[sentence for document in block for sentence in document] for block in blocks]
        parts = {
            "ids": [np.concatenate([np.zeros(0, dtype), *block]).astype(dtype) for block in sentences],
            "lengths": [np.array([len(sentence) for sentence in block], np.int32) for block in sentences],
            "ends": [np.cumsum([len(document) for document in block]).astype(np.int32) for block in blocks],
        }
        facts = write_shard(tmp_path / "ours", dtype, lambda name, parts=parts: iter(parts[name]))
        for ending in ("bin", "idx"):
            data = (tmp_path / f"ours.{ending}").read_bytes()
            assert data == (tmp_path / f"theirs.{ending}").read_bytes()
            assert facts[ending] == {
                "file": f"ours.{ending}",
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }


def test_any_number_of_workers_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs_module, "BLOCK", 1 << 14)
    monkeypatch.setattr(stages, "LINES_PER_BUCKET", 1000)
    lines = some_lines(3000)
    files: dict[str, Any] = {
        "en": [written(tmp_path / "en.txt", lines + lines[::3])],
        "sw": [written(tmp_path / "sw.txt", some_lines(500, 1, "за ко ли ми"))],
    }
    made = [prepare(files, tmp_path / str(n), vocabulary_size=200, limits={"en": 1500}, workers=n) for n in (1, 2, 3)]
    assert contents(made[0].folder) == contents(made[1].folder) == contents(made[2].folder)
    assert made[0].manifest["languages"]["en"]["dropped"]["duplicate"]["lines"] == 1000


def test_the_size_of_blocks_and_buckets_doesnt_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = some_lines(2000)
    file = written(tmp_path / "en.txt", [*lines, "", "\x07", *[""] * 20_000, *lines[::2]])  # some blocks are all blank
    whole = build(tmp_path / "whole", 200, en=file)
    monkeypatch.setattr(inputs_module, "BLOCK", 7777)
    monkeypatch.setattr(stages, "LINES_PER_BUCKET", 700)
    pieces = build(tmp_path / "pieces", 200, en=file)
    assert contents(whole.folder) == contents(pieces.folder)


def test_lines_are_dropped_by_reason_and_the_first_named(tmp_path: Path) -> None:
    good = some_lines(100)
    data = "\n".join([good[0], "", good[0], "\x07\u200b", *good[1:], "  "]).encode()
    data += b"\nno utf-8: \xff\n" + b"x" * 70_000 + b"\nle dernier sans fin"
    (tmp_path / "en.txt").write_bytes(data)
    corpus = build(tmp_path / "out", en=tmp_path / "en.txt")
    assert corpus.manifest["languages"]["en"]["dropped"] == {
        "empty": {"lines": 2, "first": ["en.txt:2", "en.txt:104"]},
        "control characters only": {"lines": 1, "first": ["en.txt:4"]},
        "invalid UTF-8": {"lines": 1, "first": ["en.txt:105"]},
        "too long": {"lines": 1, "first": ["en.txt:106"]},
        "duplicate": {"lines": 1, "first": ["en.txt:3"]},
    }
    found = {sentence for split in SPLITS for sentence in texts(corpus, "en", split)}
    assert {*good} - found == set() and len(found) == 101


@pytest.mark.parametrize("end", ["\r", "\u2028", "\u2029", "\x85", "\r\n"])
def test_lines_may_end_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setattr(inputs_module, "BLOCK", 1000)  # an end may be torn apart
    lines = some_lines(200)
    (tmp_path / "en.txt").write_bytes(end.join(lines).encode())
    corpus = build(tmp_path / "out", en=tmp_path / "en.txt")
    assert {sentence for split in SPLITS for sentence in texts(corpus, "en", split)} == set(lines)
    assert [normalise(line) for line in lines_of(end.join(lines))] == lines


@pytest.mark.parametrize("second", ["\r", "\r\n"])
def test_files_whose_lines_end_differently_may_be_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: str
) -> None:
    monkeypatch.setattr(inputs_module, "BLOCK", 1000)
    lines = some_lines(200)
    text = "\n".join(lines[:90]) + "\n" + second.join(lines[90:])
    (tmp_path / "en.txt").write_bytes(text.encode())
    corpus = build(tmp_path / "out", en=tmp_path / "en.txt")
    assert {sentence for split in SPLITS for sentence in texts(corpus, "en", split)} == set(lines)
    assert corpus.manifest["languages"]["en"]["dropped"] == {}
    assert lines_of(text) == lines


def test_byte_order_marks_make_no_words(tmp_path: Path) -> None:
    """Files that were joined have one inside, and some programs write two."""
    lines = some_lines(200)
    marked = [f"\ufeff\ufeff{lines[0]}", *lines[1:100], f"\ufeff{lines[100]}", *lines[101:], "\ufeff"]
    corpus = build(tmp_path / "out", en=written(tmp_path / "en.txt", marked))
    assert {sentence for split in SPLITS for sentence in texts(corpus, "en", split)} == set(lines)
    assert corpus.manifest["languages"]["en"]["dropped"] == {
        "control characters only": {"lines": 1, "first": ["en.txt:201"]}
    }


def test_text_is_normalised_before_it_is_compared(tmp_path: Path) -> None:
    lines = some_lines(60)
    messy = [line.replace(" ", " \u00a0\t").replace("é", "e\u0301") + "\r" for line in lines]
    file = written(tmp_path / "en.txt", [*lines, *messy])
    corpus = build(tmp_path / "out", en=file)
    assert corpus.manifest["languages"]["en"]["dropped"]["duplicate"]["lines"] == 60


def test_limit_takes_nested_subsets_and_leaves_what_is_held_out(tmp_path: Path) -> None:
    file = written(tmp_path / "fr.txt", some_lines(2000))
    made = {
        n: prepare({"fr": [file]}, tmp_path / str(n), vocabulary_size=100, limits={"fr": n} if n else {}, workers=1)
        for n in (0, 500, 100, 99_999)
    }
    train = {n: set(texts(corpus, "fr", "train")) for n, corpus in made.items()}
    assert [len(train[n]) for n in (100, 500, 0, 99_999)] == [100, 500, 1900, 1900]
    assert train[100] < train[500] < train[0] == train[99_999]
    for split in ("valid", "test"):
        assert texts(made[0], "fr", split) == texts(made[100], "fr", split)
    assert made[100].manifest["languages"]["fr"]["dropped"]["over the limit"]["lines"] == 1800


def test_halves_share_out_a_text_and_have_no_sentence_in_common(tmp_path: Path) -> None:
    """Repeated lines fall to one half alone; what is left out of a half is counted, and the other languages keep all."""
    lines = some_lines(1000)
    text, other = written(tmp_path / "en.txt", [*lines, *lines[:100]]), written(tmp_path / "sw.txt", some_lines(200, 1))
    options: dict[str, Any] = {"vocabulary_size": 80, "workers": 1, "progress": False}
    corpus = prepare({"en": [text], "sw": [other]}, tmp_path / "out", halves={"en-b": "en"}, **options)
    assert corpus.languages == ["en", "sw", "en-b"]
    halves = [{line for split in SPLITS for line in texts(corpus, code, split)} for code in ("en", "en-b")]
    assert halves[0] | halves[1] == set(lines) and not halves[0] & halves[1]
    assert 430 < len(halves[0]) < 570, "a fair coin for each: five standard deviations are 79"
    for code, other_half in (("en", 1), ("en-b", 0)):
        dropped = corpus.manifest["languages"][code]["dropped"]
        assert dropped["duplicate"]["lines"] == 100 and dropped["in the other half"]["lines"] == len(halves[other_half])
    assert sum(corpus.sentences("sw", split) for split in SPLITS) == 200
    for wrong in ({"en-b": "fr"}, {"sw": "en"}, {"en-b": "en", "en-c": "en"}):
        with pytest.raises(UserError, match="expected a new code and, once, a language that has inputs"):
            prepare({"en": [text], "sw": [other]}, tmp_path / "wrong", halves=wrong, **options)


def test_a_meta_split_takes_its_text_from_train_alone(tmp_path: Path) -> None:
    file = written(tmp_path / "fr.txt", some_lines(2000))
    without = prepare({"fr": [file]}, tmp_path / "without", vocabulary_size=100, workers=1)
    corpus = prepare({"fr": [file]}, tmp_path / "with", vocabulary_size=100, meta_split=True, workers=1)
    for split in ("valid", "test"):
        assert texts(corpus, "fr", split) == texts(without, "fr", split)
    train, meta = texts(corpus, "fr", "train"), texts(corpus, "fr", "meta")
    assert len(meta) == held_out(2000) == 50 and not set(train) & set(meta)
    assert sorted([*train, *meta]) == sorted(texts(without, "fr", "train"))
    for folder, meta_split in (("without", True), ("with", False)):
        with pytest.raises(UserError, match="holds a corpus with other meta_split"):
            prepare({"fr": [file]}, tmp_path / folder, vocabulary_size=100, meta_split=meta_split, workers=1)
    with pytest.raises(UserError, match=r"--tokenizer .* and --extend .*give one of them"):
        prepare({"fr": [file]}, tmp_path / "both", tokenizer=without.folder, extends=without.folder, workers=1)


def test_another_corpus_tokenizer_can_be_used(prepared: Prepared, tmp_path: Path) -> None:
    file = written(tmp_path / "en.txt", some_lines(300, 5))
    corpus = prepare({"en": [file]}, tmp_path / "out", tokenizer=prepared[0].tokenizer.path, workers=1)
    assert corpus.tokenizer.pieces == prepared[0].tokenizer.pieces
    assert sum(corpus.sentences("en", split) for split in SPLITS) == 300


def test_temperature_gives_small_languages_more_of_the_vocabulary(tmp_path: Path) -> None:
    files: dict[str, Any] = {
        "en": [written(tmp_path / "en.txt", some_lines(4000))],
        "ru": [written(tmp_path / "ru.txt", some_lines(60, 1, "за ко ли ми"))],
    }
    cyrillic = []
    for temperature in (1.0, 5.0):
        corpus = prepare(files, tmp_path / str(temperature), vocabulary_size=150, temperature=temperature, workers=1)
        cyrillic.append(sum(any("а" <= c <= "я" for c in piece) for piece in corpus.tokenizer.pieces))
    assert cyrillic[0] < cyrillic[1]


def test_a_part_of_a_large_language_is_sampled_with_the_right_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "distinct_characters", lambda size: 1000)  # so that 20,000 characters are read
    seen: dict[str, int] = {}
    real = vocabulary.trained
    monkeypatch.setattr(vocabulary, "trained", lambda units, *rest: (seen.update(units), real(units, *rest))[1])
    files: dict[str, Any] = {
        "en": [written(tmp_path / "en.txt", [f"{line} en" for line in some_lines(4000)])],
        "sw": [written(tmp_path / "sw.txt", [f"{line} sw" for line in some_lines(400, 1)])],
    }
    corpus = prepare(files, tmp_path / "out", vocabulary_size=150, temperature=2.0, workers=1)
    expected = (corpus.sentences("en", "train") / corpus.sentences("sw", "train")) ** 0.5
    assert seen["\u2581en"] / seen["\u2581sw"] == pytest.approx(expected, rel=0.01)
    assert seen["\u2581en"] < 1000  # of 3760


@pytest.mark.parametrize("opener", [gzip.open, bz2.open, lzma.open])
def test_compressed_text_is_the_same_text(tmp_path: Path, opener: Any) -> None:
    lines = some_lines(200)
    plain = build(tmp_path / "plain", en=written(tmp_path / "en.txt", lines))
    with opener(tmp_path / "en.packed", "wb") as file:  # told by content, not by name
        file.write((tmp_path / "en.txt").read_bytes())
    packed = build(tmp_path / "packed", en=tmp_path / "en.packed")
    files = [contents(corpus.folder) for corpus in (plain, packed)]
    assert all(
        files[0][name] == files[1][name] for name in files[0].keys() | files[1].keys() if name != "manifest.json"
    )
    source = packed.manifest["languages"]["en"]["sources"][0]
    data = (tmp_path / "en.packed").read_bytes()
    assert source == {"name": "en.packed", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_a_folder_is_all_its_files(tmp_path: Path) -> None:
    lines = some_lines(200)
    (tmp_path / "in" / "b").mkdir(parents=True)
    written(tmp_path / "in" / "b" / "one.txt", lines[100:])
    with gzip.open(tmp_path / "in" / "a.gz", "wt") as file:
        file.write("\n".join(lines[:100]))
    written(tmp_path / "in" / ".hidden", ["hidden"])
    corpus = build(tmp_path / "out", en=tmp_path / "in")
    assert sum(corpus.sentences("en", split) for split in SPLITS) == 200
    assert [s["name"] for s in corpus.manifest["languages"]["en"]["sources"]] == ["in/a.gz", "in/b/one.txt"]


def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = "\n".join(some_lines(100)).encode()
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(data)))
    corpus = build(tmp_path / "out", en="-")
    assert sum(corpus.sentences("en", split) for split in SPLITS) == 100
    with pytest.raises(UserError, match="is finished; to read standard input again"):
        build(tmp_path / "out", en="-")


def documents(count: int) -> list[list[str]]:
    lines = iter(some_lines(5 * count))
    return [[f"{next(lines)}." for _ in range(1 + n % 5)] for n in range(count)]


def check_documents_are_whole(corpus: Corpus, expected: list[list[str]]) -> None:
    split_of = {sentence: split for split in SPLITS for sentence in texts(corpus, "en", split)}
    assert set(split_of) == {sentence for document in expected for sentence in document}
    assert all(len({split_of[sentence] for sentence in document}) == 1 for document in expected)
    assert len(set(split_of.values())) == 3
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    filled = [split for split in SPLITS if split != "meta"]  # megatron opens no empty file
    starts = [len(indexed.IndexedDataset(str(corpus.folder / f"en.{split}")).document_indices) - 1 for split in filled]
    assert sum(starts) == len(expected)


def test_extracted_dump_is_split_by_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs_module, "BLOCK", 500)
    expected = documents(120)
    text = "".join(
        f'<doc id="{n}" url="u?curid={n}" title="T">\n{" ".join(of[:2])}\n\n{" ".join(of[2:])}\n</doc>\n'
        for n, of in enumerate(expected)
    )
    (tmp_path / "wiki_00").write_text(text.replace(expected[0][0], expected[0][0].replace("a", "&#97;", 1)))
    corpus = build(tmp_path / "out", en=tmp_path / "wiki_00")
    check_documents_are_whole(corpus, expected)


NAMESPACES = {0: "", 6: "Tập tin", 10: "Bản mẫu", 14: "Thể loại"}


def dump(pages: list[str]) -> str:
    page = "<page><title>T</title><ns>{}</ns>{}<revision><text>{}</text></revision></page>"
    body = "".join(page.format(0, "", text) for text in pages)
    body += page.format(1, "", "talk talk") + page.format(0, '<redirect title="x"/>', "#REDIRECT [[x]]")
    names = "".join(f'<namespace key="{key}">{name}</namespace>' for key, name in NAMESPACES.items())
    head = f"<siteinfo><namespaces>{names}</namespaces></siteinfo>"
    return f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/">{head}{body}</mediawiki>'


def test_wikipedia_dump_is_cleaned_and_split_by_document(tmp_path: Path) -> None:
    pytest.importorskip("mwparserfromhell")
    expected = documents(120)
    with bz2.open(tmp_path / "enwiki.xml.bz2", "wt") as file:
        file.write(dump(["\n\n".join([*of, "[[Tập tin:Hà Nội|nhỏ|phải]][[Thể loại:Hà Nội]]"]) for of in expected]))
    corpus = build(tmp_path / "out", en=tmp_path / "enwiki.xml.bz2")
    check_documents_are_whole(corpus, expected)


@pytest.mark.parametrize(
    "paragraph, sentences",
    [
        ("One. Two? Three", ["One.", "Two?", "Three"]),
        ("本当！？そうだ。「はい。」と言った。", ["本当！？", "そうだ。", "「はい。」と言った。"]),
        ("ကက။ ခခ။", ["ကက။", "ခခ။"]),
        ("ខខ។ គគ៕ ឃឃ", ["ខខ។", "គគ៕", "ឃឃ"]),
        ("ሰላም። ነው፧ አዎ።", ["ሰላም።", "ነው፧", "አዎ።"]),
        ("བོད། ཡིག། །", ["བོད།", "ཡིག། །"]),
        ("Բարև։ Այո։", ["Բարև։", "Այո։"]),
    ],
)
def test_paragraphs_are_cut_at_each_scripts_marks(paragraph: str, sentences: list[str]) -> None:
    assert [sentence for sentence in SENTENCE_END.split(paragraph) if sentence] == sentences


def test_wiki_markup_is_removed() -> None:
    pytest.importorskip("mwparserfromhell")
    from mlinterf_ds.data.prepare.cleaning import plain_text

    markup = """{{Infobox|name=x}}
'''Nairobi''' ni [[mji mkuu|mji]] wa [[Kenya]].<ref name="a">{{cite|title=x}}</ref> Watu ''wengi''.<ref name="a" />
[[Picha:Nairobi.jpg|thumb|left|A [[caption]] with links]]
== Historia ==
* Kwanza
{| class="wikitable"
! a || b
|}
[[Jamii:Miji ya Kenya]] [[Category:Towns]] [[fr:Nairobi]] [[zh-yue:Nairobi]]
[https://example.org tovuti rasmi] &amp; <!-- hidden -->[[Star Trek: Voyager]]
[[3:10 to Yuma (2007 film)|3:10 to Yuma]], [[wikt:house|house]], [[:Category:Towns|towns]]
One.<br>Two.<br />Three<p class="x">Four</p>
[http://example.org five<br>six] seven
"""
    assert [line.strip() for line in plain_text(markup, ["Picha", "Jamii"]).split("\n") if line.strip()] == [
        "Nairobi ni mji wa Kenya. Watu wengi.",
        "Historia",
        "Kwanza",
        "tovuti rasmi & Star Trek: Voyager",
        "3:10 to Yuma, house, towns",
        *["One.", "Two.", "Three", "Four", "five", "six seven"],
    ]


def test_hugging_face_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = documents(80)
    calls = []

    def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> list[dict[str, str]]:
        calls.append((name, config, split, streaming))
        return [{"body": None}, *({"body": " ".join(of)} for of in expected)]  # a row can lack its text

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    corpus = build(tmp_path / "out", en="hf:own/name:20231101.en::body")
    assert calls == [("own/name", "20231101.en", "train", True)]
    check_documents_are_whole(corpus, expected)
    with pytest.raises(UserError, match="no text column 'text'; it has: body"):
        build(tmp_path / "other", en="hf:own/name")


def test_a_finished_corpus_is_returned_as_it_is(tmp_path: Path) -> None:
    file = written(tmp_path / "en.txt", some_lines(100))
    first = build(tmp_path / "out", en=file)
    before = {p: p.stat().st_mtime_ns for p in first.folder.iterdir()}
    assert prepare({"en": [file]}, tmp_path / "out", vocabulary_size=80, workers=2).manifest_hash == first.manifest_hash
    assert before == {p: p.stat().st_mtime_ns for p in first.folder.iterdir()}


def test_command_line(tmp_path: Path) -> None:
    written(tmp_path / "en.txt", some_lines(200))
    written(tmp_path / "sw.txt", some_lines(200, 1))
    command = [
        sys.executable,
        str(TOOL),
        *["--out", "out", "--vocab-size", "80", "--limit", "sw=50", "en=en.txt", "sw=sw.txt"],
    ]
    done = subprocess.run([*command, "--licence", "CC0"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "out: 2 languages, 80 pieces" in done.stdout.splitlines()[-1]
    assert "sw: dropped 110 over the limit" in done.stdout
    corpus = Corpus.open(tmp_path / "out")
    assert corpus.sentences("sw", "train") == 50 and corpus.manifest["licence"] == "CC0"
    tokens = sum(len(corpus.tokens("en", split)) for split in SPLITS)
    assert f"{tokens:,}" in done.stdout
    help_text = subprocess.run([*command[:2], "--help"], capture_output=True, text=True).stdout
    assert "--vocab-temperature" in help_text and "hf:NAME" in help_text


def test_preparing_doesnt_import_torch() -> None:
    code = "import sys, mlinterf_ds.data.prepare.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def peak_memory(arguments: list[str], folder: Path) -> int:
    """Bytes at most resident in a run's one process (its own: what the system counts for a child starts at its parent's)."""
    code = f"import sys; sys.path.insert(0, {str(TOOL.parent)!r}); import prepare_corpus; \
prepare_corpus.main(sys.argv[1:]); print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1]) * 1024


def test_real_text(tmp_path: Path, shared_data: Path) -> None:
    """Languages in nine scripts: next to nothing is unknown, and it reads back."""
    codes = ["en", "ar", "hi", "th", "ko", "ka", "am", "ru", "te"]
    files: dict[str, Any] = {}
    for code in codes:
        with (shared_data / "text" / f"{code}.txt").open() as file:
            files[code] = [
                written(tmp_path / code, [line.rstrip("\n") for _, line in zip(range(1500), file, strict=False)])
            ]
    corpus = prepare(files, tmp_path / "out", vocabulary_size=4000)
    corpus.verify()
    for code in codes:
        splits = corpus.manifest["languages"][code]["splits"]
        assert sum(s["unknown"] for s in splits.values()) < 0.002 * sum(s["tokens"] for s in splits.values())
        known = {normalise(line) for line in files[code][0].read_text().split("\n")}
        exact = [sentence for sentence in texts(corpus, code, "valid") if "\u2047" not in sentence]
        assert len(exact) > 0.7 * corpus.sentences(code, "valid") and set(exact) <= known

"""Bad input, full disks, interruptions and damaged folders: a clear error each, and nothing lost or half-loaded."""

import bz2
import errno
import gzip
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlinterf_ds import files
from mlinterf_ds.data.corpus import Corpus
from mlinterf_ds.data.prepare import inputs as inputs_module
from mlinterf_ds.data.prepare import main as prepare_module
from mlinterf_ds.data.prepare.main import prepare
from mlinterf_ds.data.prepare.workers import WorkerKilled, Workers
from mlinterf_ds.errors import UserError
from tests.unit.test_corpus import SPLITS, TOOL, build, contents, dump, peak_memory, some_lines, texts, written


def refused(match: str, out: Path, sources: dict[str, Any], **options: Any) -> None:
    """The sources are refused with a message, and the folder isn't even made."""
    with pytest.raises(UserError, match=match):
        prepare(sources, out, **{"vocabulary_size": 80, "workers": 1, **options})
    assert not out.exists()


@pytest.fixture
def lines_file(tmp_path: Path) -> Path:
    return written(tmp_path / "en.txt", some_lines(300))


def test_arguments_that_cannot_be_meant(tmp_path: Path, lines_file: Path) -> None:
    out = tmp_path / "out"
    refused("no languages: give at least one, as LANGUAGE=FILE", out, {})
    refused("language 'shared': .* and not 'shared'", out, {"shared": [lines_file]})
    refused("language 'EN': .*write 'en'", out, {"en": [lines_file], "EN": [lines_file]})
    refused("language '../x'", out, {"../x": [lines_file]})
    refused("language 'en': no input", out, {"en": []})
    refused("given twice", out, {"en": ["-"], "sw": ["-"]})
    refused("limit fr=10: no such language in this corpus; it has en", out, {"en": [lines_file]}, limits={"fr": 10})
    refused("limit en=0: must be at least 1", out, {"en": [lines_file]}, limits={"en": 0})
    refused("vocabulary size -5", out, {"en": [lines_file]}, vocabulary_size=-5)
    refused("temperature 0: must be above 0", out, {"en": [lines_file]}, temperature=0)
    refused("workers 0: must be at least 1", out, {"en": [lines_file]}, workers=0)
    refused("x.model: the tokenizer cannot be read", out, {"en": [lines_file]}, tokenizer=tmp_path / "x.model")

    refused("missing.txt: no such file", out, {"en": [tmp_path / "missing.txt"]})
    refused("empty.txt: the file is empty", out, {"en": [written(tmp_path / "empty.txt", [])]})
    (tmp_path / "folder").mkdir()
    written(tmp_path / "folder" / "empty.txt", [])
    refused("folder: the folder holds no files", out, {"en": [tmp_path / "folder"]})


def test_a_file_of_blank_lines_or_too_few_sentences(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"en \(blank.txt\): 0 distinct .* at least 50 .*dropped: 70 empty"):
        build(tmp_path / "out", en=written(tmp_path / "blank.txt", [" "] * 70))
    with pytest.raises(UserError, match=r"0 distinct sentences .*1 too long"):
        build(tmp_path / "out", en=written(tmp_path / "endless.txt", ["word " * 100_000]))
    few = written(tmp_path / "few.txt", some_lines(49) * 5)
    with pytest.raises(UserError, match=r"49 distinct sentences .* at least 50 .*dropped: 196 duplicate"):
        build(tmp_path / "out", en=few)
    enough = build(tmp_path / "out", en=written(tmp_path / "enough.txt", some_lines(50)))
    assert [enough.sentences("en", split) for split in SPLITS] == [40, 0, 5, 5]


def test_binary_input_is_refused_by_file_and_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs_module, "BLOCK", 1000)
    file = tmp_path / "en.bin"
    file.write_bytes("\n".join(some_lines(500)).encode() + b"\n\nab\0cd\nxyz\n")
    with pytest.raises(UserError, match=r"en.bin, line 502: a NUL byte"):
        build(tmp_path / "out", en=file)
    file.write_text("\n".join(some_lines(500)), encoding="utf-16")
    with pytest.raises(UserError, match=r"en.bin, line 1: a NUL byte.*UTF-16"):
        build(tmp_path / "out", en=file)


def test_another_encoding_is_refused_and_stray_bytes_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "fr.txt"
    good = some_lines(300)
    file.write_bytes("".join(f"{line} é\n" if n % 3 else f"{line}\n" for n, line in enumerate(good)).encode("latin-1"))
    with pytest.raises(UserError, match=r"fr.txt, line 2: not UTF-8 \(200 of the 300 lines .*iconv"):
        build(tmp_path / "out", fr=file)
    data = "\n".join(good).encode().split(b"\n")
    for number in (10, 20, 30):
        data[number - 1] = b"\xe9" + data[number - 1]
    file.write_bytes(b"\n".join(data))
    dropped = build(tmp_path / "out", fr=file).manifest["languages"]["fr"]["dropped"]
    assert dropped == {"invalid UTF-8": {"lines": 3, "first": ["fr.txt:10", "fr.txt:20", "fr.txt:30"]}}


def test_a_50_megabyte_line_is_dropped_and_never_held(tmp_path: Path) -> None:
    lines = some_lines(200)
    plain = written(tmp_path / "plain.txt", lines)
    with (tmp_path / "en.txt").open("wb") as file:
        file.write("".join(f"{line}\n" for line in lines[:100]).encode())
        for _ in range(50):
            file.write("длинная строка ".encode() * 40_000)
        file.write("".join(f"\n{line}" for line in lines[100:]).encode() + b"\n\xff")
    assert (tmp_path / "en.txt").stat().st_size > 50e6
    options = ["--vocab-size", "80", "--workers", "1"]
    peaks = [peak_memory([*options, "--out", f"{name}-out", f"en={name}.txt"], tmp_path) for name in ("plain", "en")]
    assert peaks[1] < peaks[0] + 30e6, peaks
    corpus, expected = (Corpus.open(tmp_path / f"{name}-out") for name in ("en", "plain"))
    assert corpus.manifest["languages"]["en"]["dropped"] == {
        "too long": {"lines": 1, "first": ["en.txt:101"]},
        "invalid UTF-8": {"lines": 1, "first": ["en.txt:202"]},
    }
    for split in SPLITS:
        assert texts(corpus, "en", split) == texts(expected, "en", split)
    assert plain.exists()


def test_memory_is_flat(tmp_path: Path) -> None:
    """Ten times the text, a third of it duplicates, takes hardly more memory."""
    lines = some_lines(50_000)
    size = sum(len(line) + 1 for line in lines)
    peaks = []
    for name, wanted in (("small", 3e6), ("large", 30e6)):
        with (tmp_path / name).open("w") as file:
            for copy in range(round(wanted / size)):
                mark = "" if copy % 3 == 2 else f"{copy} "  # every third copy is the same
                file.write("".join(f"{mark}{line}\n" for line in lines))
        options = ["--out", f"{name}.corpus", "--vocab-size", "500", "--workers", "1", f"en={name}"]
        peaks.append(peak_memory(options, tmp_path))
    assert peaks[1] < peaks[0] + 60e6, peaks
    assert peaks[1] < 300e6, peaks


def test_damaged_archives_and_dumps(tmp_path: Path) -> None:
    packed = gzip.compress("\n".join(some_lines(3000)).encode())
    small = bz2.compress("\n".join(some_lines(3000)).encode())
    for name, data in (
        ("short.gz", packed[:-2000]),
        ("bad.gz", packed[:2000] + b"\x55" * 50 + packed[2050:]),
        ("bad.bz2", small[:2000] + b"\x55" * 50 + small[2050:]),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name}: the compressed file is damaged"):
            build(tmp_path / "out", en=tmp_path / name)
    (tmp_path / "wiki.xml").write_text(dump(["text"])[:-30])
    with pytest.raises(UserError, match=r"wiki.xml, line 1: not well-formed XML"):
        build(tmp_path / "out", en=tmp_path / "wiki.xml")


def test_markup_is_no_text(tmp_path: Path) -> None:
    body = "".join(f"<seg>{line}</seg>" for line in some_lines(100))
    for start, match in (
        ('<?xml version="1.0"?><tmx>{}</tmx>', r"en: XML whose root is <tmx>, and not a MediaWiki dump"),
        ("<!DOCTYPE html><p>{}</p>", "en: begins with '<!DOCTYPE', so it is markup"),
        ("<html>{}</html>", "en: begins with '<html'"),
        ('{{"text": "{}"}}', r"en: begins with '\{\"', so it is markup \(HTML, XML or JSON\)"),
    ):
        (tmp_path / "en").write_text(start.format(body), "utf-8")
        with pytest.raises(UserError, match=match):
            build(tmp_path / "out", en=tmp_path / "en")


def test_tables_markup_and_programs_own_formats_are_no_running_text(tmp_path: Path) -> None:
    """Numbers, tags and quotation marks would be trained on as words."""
    lines = some_lines(100)
    numbered, tagged = (
        "\n".join(form.format(n, line) for n, line in enumerate(lines)) for form in ("{}\t{}", "<p>{1}</p>")
    )
    for data, match in (
        (numbered.encode(), r"en: 9\d of its first 9\d lines have 2 columns separated by tabs.*cut -f2"),
        (tagged.encode(), r"en: 9\d of its first 9\d lines begin and end with a tag, so it is markup"),
        (json.dumps(lines, indent=1).encode(), r"en: begins with '\[.*so it is markup"),
        (b"PAR1" + bytes(99), "en: a Parquet table and not plain text"),
        (b"\x28\xb5\x2f\xfd" + bytes(99), "en: a file compressed with zstd"),
    ):
        (tmp_path / "en").write_bytes(data)
        with pytest.raises(UserError, match=match):
            build(tmp_path / "out", en=tmp_path / "en")
    text = [
        line if n % 3 else f"\t{line}\tand <b>more" for n, line in enumerate(lines)
    ]  # indented, with tabs and tags inside
    build(tmp_path / "out", en=written(tmp_path / "en", text))


def test_standard_input_that_is_closed(tmp_path: Path) -> None:
    line = f"{sys.executable} {TOOL} --out out --vocab-size 80 en=- <&-"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "standard input): it is closed; pipe the text" in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_one_process_does_the_work_where_no_more_can_be_started(
    tmp_path: Path, lines_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read_only(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    expected = contents(build(tmp_path / "alone", en=lines_file).folder)
    monkeypatch.setattr("mlinterf_ds.data.prepare.workers.ProcessPoolExecutor", read_only)
    corpus = prepare({"en": [lines_file]}, tmp_path / "out", vocabulary_size=80, workers=2)
    assert contents(corpus.folder) == expected
    assert "warning: /dev/shm, which 2 processes need, cannot be used (Read-only" in capsys.readouterr().err


def test_hugging_face_without_library_or_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="hf:some/name: needs the library `datasets`: pip install datasets"):
        build(tmp_path / "out", en="hf:some/name")

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=offline))
    with pytest.raises(UserError, match=r"hf:some/name: .*cannot be loaded \(ConnectionError: no route\).*online"):
        build(tmp_path / "out", en="hf:some/name")
    with pytest.raises(UserError, match="expected hf:NAME"):
        build(tmp_path / "out", en="hf:a:b:c:d:e")


def test_a_vocabulary_too_large_can_be_mended_in_the_same_folder(tmp_path: Path, lines_file: Path) -> None:
    with pytest.raises(UserError, match=r"vocabulary size 32000: larger than the text allows, at most \d+"):
        prepare({"en": [lines_file]}, tmp_path / "out", workers=1)
    with pytest.raises(UserError, match="not a prepared corpus"):
        Corpus.open(tmp_path / "out")
    mended = build(tmp_path / "out", en=lines_file)
    assert contents(mended.folder) == contents(build(tmp_path / "fresh", en=lines_file).folder)


def test_folders_in_use_are_left_alone(tmp_path: Path, lines_file: Path) -> None:
    with pytest.raises(UserError, match=r"en.txt: is a file; give a folder"):
        build(lines_file, en=lines_file)
    (tmp_path / "repository" / ".git").mkdir(parents=True)
    (tmp_path / "repository" / ".git" / "index").write_bytes(bytes(99))
    with pytest.raises(UserError, match="holds no files, or only empty or hidden ones"):
        inputs_module.find_inputs(tmp_path / "repository")
    (tmp_path / "mine").mkdir()
    written(tmp_path / "mine" / "thesis.txt", ["precious"])
    with pytest.raises(UserError, match=r"mine: holds other files \(thesis.txt\)"):
        build(tmp_path / "mine", en=lines_file)
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]
    corpus = build(tmp_path / "out", en=lines_file)
    before = contents(corpus.folder)
    with pytest.raises(UserError, match=r"out: holds a corpus with other vocabulary .*another folder"):
        prepare({"en": [lines_file]}, tmp_path / "out", vocabulary_size=70, workers=1)
    with pytest.raises(UserError, match="with other limits"):
        prepare({"en": [lines_file]}, tmp_path / "out", vocabulary_size=80, limits={"en": 50})
    written(lines_file, [line.replace("b", "d") for line in lines_file.read_text().splitlines()])
    with pytest.raises(UserError, match=r"en.txt was changed since"):
        build(tmp_path / "out", en=lines_file)
    shutil.rmtree(tmp_path / "out" / ".work", ignore_errors=True)
    assert contents(corpus.folder) == before


def test_another_corpus_in_the_same_folder_has_its_own_vocabulary(tmp_path: Path, lines_file: Path) -> None:
    """One process prepares both, and keeps the tokenizer that it last used."""
    build(tmp_path / "out", en=lines_file)
    shutil.rmtree(tmp_path / "out")
    greek = written(tmp_path / "el", [line.translate({n: n + 848 for n in range(97, 123)}) for line in some_lines(300)])
    corpus = build(tmp_path / "out", el=greek)
    assert corpus.unknown("el") == 0 and contents(corpus.folder) == contents(build(tmp_path / "fresh", el=greek).folder)


def test_a_file_from_the_future_is_no_changed_file(tmp_path: Path, lines_file: Path) -> None:
    """Copied from a machine whose clock is ahead: the finished corpus is opened as it is."""
    corpus = build(tmp_path / "out", en=lines_file)
    os.utime(lines_file, (time.time() + 9e6,) * 2)
    before = contents(corpus.folder)
    assert contents(build(tmp_path / "out", en=lines_file).folder) == before


def test_two_at_once_in_one_folder(tmp_path: Path, lines_file: Path) -> None:
    (tmp_path / "out" / ".work").mkdir(parents=True)
    code = "import fcntl, time; f = open('out/.work/lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(UserError, match="another process is preparing a corpus here"):
            build(tmp_path / "out", en=lines_file)
    finally:
        other.kill()
        other.communicate()
    build(tmp_path / "out", en=lines_file)


@pytest.fixture
def two_languages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Inputs of several small blocks, and what is made of them."""
    monkeypatch.setattr(inputs_module, "BLOCK", 4000)
    lines = some_lines(200)
    return {
        "en": written(tmp_path / "en.txt", lines + lines[:50]),
        "sw": written(tmp_path / "sw.txt", some_lines(100, 1)),
    }


def failing_at(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """Let the `number`-th file (from 0) that is written fail, with half of its first write done."""
    real, count = files.replacing, iter(range(10**6))

    class Half:
        def __init__(self, file: Any) -> None:
            self._file = file

        def write(self, data: Any) -> None:
            self._file.write(bytes(data)[: len(data) // 2])
            raise error

    def replacing(path: Path) -> Any:
        return half(path) if next(count) == number else real(path)

    @files.contextmanager
    def half(path: Path) -> Iterator[Any]:
        with real(path) as file:
            yield Half(file)

    for module in (files, sys.modules["mlinterf_ds.data.prepare.shards"]):
        monkeypatch.setattr(module, "replacing", replacing)


def test_failing_at_any_file_leaves_nothing_that_loads_and_a_rerun_finishes(
    tmp_path: Path, two_languages: dict[str, Path]
) -> None:
    """By a full disk and by an interrupt in turn."""
    errors = OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()
    expected = contents(build(tmp_path / "whole", **two_languages).folder)
    failures = 0
    for number in range(200):
        out = tmp_path / str(number)
        with pytest.MonkeyPatch.context() as patch:
            failing_at(patch, number, errors[number % 2])
            try:
                build(out, **two_languages)
                break  # all files were written before the one that was to fail
            except KeyboardInterrupt:
                pass
            except UserError as full:
                assert "the disk is full (No space left on device); free some space and run the same" in str(full)
        failures += 1
        with pytest.raises(UserError, match="not a prepared corpus"):
            Corpus.open(out)
        assert contents(build(out, **two_languages).folder) == expected
        shutil.rmtree(out)
    assert failures > 30


def test_a_rerun_reuses_what_is_finished_but_not_what_changed(
    tmp_path: Path, two_languages: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_short(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module.stages, "encode", cut_short)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "out", **two_languages)
    blocks = sorted((tmp_path / "out" / ".work").glob("*/*.block.npz"))
    model = tmp_path / "out" / "tokenizer.model"
    times = {path: path.stat().st_mtime_ns for path in [*blocks, model]}
    assert len(blocks) > 3
    with pytest.raises(UserError, match="is half-way to a corpus with other limits"):
        prepare(
            {code: [of] for code, of in two_languages.items()}, tmp_path / "out", vocabulary_size=80, limits={"en": 9}
        )
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module.stages, "encode", cut_short)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "out", **two_languages)
    assert times == {path: path.stat().st_mtime_ns for path in times}
    changed = [line.replace("ba", "du") for line in two_languages["sw"].read_text().splitlines()]
    written(two_languages["sw"], changed)  # of the same length
    assert contents(build(tmp_path / "out", **two_languages).folder) == contents(
        build(tmp_path / "new", **two_languages).folder
    )
    assert model.stat().st_mtime_ns != times[model]


@pytest.mark.parametrize(
    "number, name, remedy",
    [
        (errno.EMFILE, None, "corpus: Too many open files; allow more .*ulimit -n"),
        (errno.EROFS, "corpora/corpus/.work", "corpora/corpus/.work: Read-only file system; name a folder .*--out"),
        (errno.EACCES, "corpora", "corpora: Permission denied; name a folder .*--out"),
        (errno.EACCES, "en.txt", "en.txt: Permission denied$"),
    ],
)
def test_what_the_system_refuses_has_a_remedy(number: int, name: str | None, remedy: str) -> None:
    with pytest.raises(UserError, match=remedy), prepare_module._explained(Path("corpora/corpus")):
        raise OSError(number, os.strerror(number), name)


def test_full_disk_at_the_command_line(tmp_path: Path) -> None:
    """A real write error, by way of the limit on a file's size."""
    written(tmp_path / "en.txt", some_lines(20_000))
    command = [sys.executable, str(TOOL), "--out", "out", "--vocab-size", "300", "en=en.txt"]

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=limited)
    assert done.returncode == 1
    assert done.stderr.startswith("prepare_corpus: out: the disk is full (File too large)")
    assert "Traceback" not in done.stderr
    with pytest.raises(UserError, match="not a prepared corpus"):
        Corpus.open(tmp_path / "out")
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
    Corpus.open(tmp_path / "out").verify()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A text of several blocks, and the corpus that a run in peace makes of it."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    lines = some_lines(70_000)
    file = written(folder / "en.txt", [*lines, *lines])
    return file, contents(prepare({"en": [file]}, folder / "out", vocabulary_size=300, workers=1).folder)


@pytest.mark.parametrize("until", [".work/en/000001.block.npz", "tokenizer.model", ".work/en/000001.tokens.npz"])
def test_killed_and_run_again(tmp_path: Path, uninterrupted: tuple[Path, dict[str, bytes]], until: str) -> None:
    file, expected = uninterrupted
    command = [sys.executable, str(TOOL), "--vocab-size", "300", "--workers", "2", f"en={file}", "--out", "out"]
    awaited = tmp_path / "out" / until
    for _ in range(5):  # on a busy machine the kill may come too late
        victim = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
        while not awaited.exists() and victim.poll() is None:
            time.sleep(0.002)
        victim.send_signal(signal.SIGKILL)  # the parent alone: its workers must not live on
        victim.wait()
        if not (tmp_path / "out" / "manifest.json").exists():
            break
        shutil.rmtree(tmp_path / "out")
    assert awaited.exists(), "too late or too early: no test"
    with pytest.raises(UserError, match="not a prepared corpus"):
        Corpus.open(tmp_path / "out")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == expected


def die(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_worker_is_an_error_not_a_hang() -> None:
    with Workers(2) as workers, pytest.raises(WorkerKilled, match="worker process was killed"):
        list(workers.map(die, range(10)))


def test_command_line_errors_have_no_traceback(tmp_path: Path) -> None:
    for arguments, expected in (
        (["en"], "'en': expected LANGUAGE=INPUT"),
        (["en=missing.txt"], "missing.txt: no such file"),
        (["en=x", "--limit", "en=many"], "--limit en=many: expected LANGUAGE=N"),
    ):
        command = [sys.executable, str(TOOL), "--out", "out", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith("prepare_corpus: ")
        assert expected in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def corpus(tmp_path: Path, lines_file: Path) -> Corpus:
    return build(tmp_path / "out", en=lines_file)


def test_open_refuses_what_is_no_corpus(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=r"not a prepared corpus \(no manifest.json\); run tools/prepare_corpus.py"):
            Corpus.open(folder)


def test_open_refuses_files_of_another_size(corpus: Corpus) -> None:
    path = corpus.folder / "en.valid.idx"
    data = path.read_bytes()
    path.write_bytes(data[:-8])
    with pytest.raises(UserError, match=rf"en.valid.idx: has {len(data) - 8:,} bytes, {len(data):,} expected"):
        Corpus.open(corpus.folder)
    path.unlink()
    with pytest.raises(UserError, match=r"en.valid.idx: is missing"):
        Corpus.open(corpus.folder)


def test_verify_finds_a_changed_bit(corpus: Corpus) -> None:
    path = corpus.folder / "en.test.bin"
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    opened = Corpus.open(corpus.folder)
    with pytest.raises(UserError, match=r"en.test.bin: its contents are not those that were prepared"):
        opened.verify()


def edit(corpus: Corpus, change: Any) -> None:
    manifest = json.loads((corpus.folder / "manifest.json").read_text())
    change(manifest)
    (corpus.folder / "manifest.json").write_text(json.dumps(manifest))


def test_manifest_cannot_lead_out_of_the_folder(corpus: Corpus, tmp_path: Path) -> None:
    outside = tmp_path / "secret.bin"
    shutil.copy(corpus.folder / "en.train.bin", outside)
    entry = corpus.manifest["languages"]["en"]["splits"]["train"]["bin"]
    for name in ("../secret.bin", str(outside)):
        edit(corpus, lambda m, name=name: m["languages"]["en"]["splits"]["train"].update(bin={**entry, "file": name}))
        with pytest.raises(UserError, match="outside the corpus folder"):
            Corpus.open(corpus.folder)


def test_damaged_manifests(corpus: Corpus) -> None:
    original = (corpus.folder / "manifest.json").read_text()
    edit(corpus, lambda m: m.update(version=99))
    with pytest.raises(UserError, match="version 99; this program reads"):
        Corpus.open(corpus.folder)
    changed = (original.replace('"bytes"', '"size"'), original.replace("uint16", "?"))
    for text in (original[:-50], "[]", "null", "{}", *changed):
        (corpus.folder / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=r"manifest.json: damaged"):
            Corpus.open(corpus.folder)

"""tools/get_data.py against an HTTP server on this machine, with miniatures of the public files."""

from __future__ import annotations

import bz2
import functools
import http.server
import io
import json
import tarfile
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools import get_data

PAGE = "<page><title>T</title><ns>0</ns><revision><text>Some words here.</text></revision></page>"
CONLLU = "# text = Du pain\n1-2\tDu\t_\t_\t_\t_\t_\t_\t_\t_\n1\tDe\t_\tADP\t_\t_\t_\t_\t_\t_\n2\tle\t_\tDET\t_\t_\t_\t_\t_\t_\n\n"


def tar_of(code: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as files:
        for split in get_data.SPLITS:
            data = f"{code}:Paris\tB-LOC\n{code}:!\tO\n\n".encode()
            entry = tarfile.TarInfo(split)
            entry.size = len(data)
            files.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def zip_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def miniature(name: str) -> bytes:
    """What the server gives for a file of `downloads`."""
    if name.endswith(".xml.bz2"):
        return bz2.compress(f"<mediawiki>{PAGE}{PAGE}<page>".encode()) + bz2.compress(b"<title>cut")[:-20]
    if name == "panx_dataset.zip":
        return zip_of({f"panx/{code}.tar.gz": tar_of(code) for code in (*get_data.TASKS, "mr")})
    if name.endswith(".conllu"):
        return CONLLU.encode()
    if name.startswith("masakhapos"):
        return b"Habari NOUN\n\n"
    if name.endswith(".json"):
        questions = [
            {"paragraphs": [{"context": "c", "qas": [{"id": f"{language}-1"}]}]}
            for language in ("english", "swahili", "thai")
        ]
        return json.dumps({"data": questions}).encode()
    head = "language\tgold_label\tsentence1\tsentence2\n"
    rows = "".join(f'{code}\tneutral\tA "b\tC\n' for code in get_data.TASKS if code != "te")
    return zip_of({f"XNLI-1.0/xnli.{split}.tsv": (head + rows).encode() for split in ("dev", "test")})


@pytest.fixture(scope="module")
def mirror(tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("mirror")
    for data in get_data.DATA_SETS:
        for name, address in data.files.items():
            path = folder / address.partition("://")[2]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(miniature(name))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("name", ["study_real.toml", "study_gpu.toml"])
def test_every_file_that_the_recipe_names_is_there(name: str, mirror: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "data"
    assert get_data.main(["--out", str(out), "--mirror", mirror]) == 0
    printed = capsys.readouterr().out
    assert "licence: Apache-2.0" in printed and f"--recipe {out / name}" in printed
    recipe = tomllib.loads((out / name).read_text())
    named = [*recipe["corpus"]["text"].values()]
    named += [path for task in recipe["tasks"] for split in get_data.SPLITS for path in task.get(split, {}).values()]
    missing = [path for path in named if path != "split" and not Path(path).is_file()]
    assert missing == [] and len(named) > 40 and not any("shared" in path for path in named)
    assert (out / "text" / "sw.xml").read_text() == f"<mediawiki>{PAGE}{PAGE}\n</mediawiki>\n"
    assert (out / "tasks/ner/panx/te/dev.tsv").read_text() == "Paris\tB-LOC\n!\tO\n\n"
    assert (out / "tasks/pos/two_column/fr_gsd/test.txt").read_text().startswith("De ADP\nle DET\n\n")
    assert (out / "tasks/nli/xnli/hi/test.tsv").read_text() == 'A "b\tC\tneutral\n'
    (article,) = json.loads((out / "tasks/qa/tydiqa_goldp/sw/train.json").read_text())["data"]
    assert article["paragraphs"][0]["qas"][0]["id"] == "swahili-1"
    facts = json.loads((out / "nli.json").read_text())
    assert facts["licence"] == "CC BY-NC 4.0" and len(facts["files"]["XNLI-1.0.zip"]["sha256"]) == 64


def test_without_a_network_it_says_what_is_missing_and_where_to_bring_it(tmp_path: Path, capsys) -> None:
    out = tmp_path / "data"
    assert get_data.main(["--out", str(out), "--only", "qa", "nli", "--mirror", "http://127.0.0.1:9"]) == 1
    said = capsys.readouterr().err
    assert said.count("cannot be fetched") == 2 and f"bring the file to {out}/downloads/XNLI-1.0.zip" in said
    assert "Traceback" not in said and not (out / "study_real.toml").exists()


def test_a_file_that_was_brought_is_used_and_a_broken_one_refused(tmp_path: Path, capsys) -> None:
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    (downloads / "XNLI-1.0.zip").write_bytes(miniature("XNLI-1.0.zip"))
    assert get_data.main(["--out", str(tmp_path), "--only", "nli"]) == 0
    (downloads / "XNLI-1.0.zip").write_bytes(b"<html>")
    assert get_data.main(["--out", str(tmp_path), "--only", "nli"]) == 1
    assert "nli: " in capsys.readouterr().err


def test_pages_in_place_of_the_files_are_one_sentence_a_set(tmp_path: Path, capsys) -> None:
    """As a hotel's network gives them for every address."""
    (tmp_path / "downloads").mkdir()
    for data in get_data.DATA_SETS:
        for name in data.files:
            (tmp_path / "downloads" / name).write_text("<html>\n<body>Sign in first</body>\n</html>\n")
    assert get_data.main(["--out", str(tmp_path)]) == 1
    problems = [line for line in capsys.readouterr().err.split("\n") if line]
    assert [line.split(": ")[1] for line in problems] == [data.name for data in get_data.DATA_SETS]
    assert all("remove them and start again" in line or "zip" in line for line in problems), problems
    assert not (tmp_path / "study_real.toml").exists()


class Breaking(http.server.BaseHTTPRequestHandler):
    """Answers who says what it is, as Wikimedia does, and breaks off in the middle of a file."""

    def do_GET(self) -> None:
        self.send_response(200 if "mlinterf_ds" in self.headers["User-Agent"] else 403)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"5\r\nabc")

    def log_message(self, *_) -> None:
        pass


def test_a_transfer_that_breaks_off_is_a_sentence_and_clients_say_what_they_are(tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Breaking) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(get_data.UserError, match=r"cannot be fetched \(IncompleteRead.*bring the file to .*x.zip"):
            get_data.fetch(f"http://127.0.0.1:{server.server_port}/x.zip", tmp_path / "x.zip", "", None)
        server.shutdown()
    assert list(tmp_path.iterdir()) == []

"""Text is UTF-8 on every machine, whatever its locale."""

import ast
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
POSITION = {"read_text": 0, "write_text": 1, "open": 2}  # of the argument `encoding`, in pathlib
CHILDREN = ("run", "Popen", "check_output")


def unencoded(path: Path) -> list[str]:
    """Calls that read or write text in the locale's encoding."""
    calls = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute | ast.Name):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
        given = any(keyword.arg == "encoding" for keyword in node.keywords)
        words = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        if name == "open":
            modes = {word for word in words if isinstance(word, str) and word.strip("rwxab+") == ""}
            of_a_file = bool(modes) or not (node.args or node.keywords)  # an archive.open(fileobj=...) holds bytes
            if of_a_file and not given and not any("b" in mode for mode in modes):
                calls.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}")
        elif name in POSITION and not given and len(node.args) <= POSITION[name]:
            calls.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}")
        elif name in CHILDREN and any(keyword.arg == "text" for keyword in node.keywords):
            calls.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}(text=True)")
    return calls


def test_every_text_file_and_every_child_process_has_its_encoding_named() -> None:
    paths = [path for folder in ("mlinterf_ds", "tools", "launch") for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 100
    assert [call for path in paths for call in unencoded(path)] == []


def test_a_terminal_that_lacks_characters_shows_question_marks() -> None:
    code = "from mlinterf_ds.errors import ready_streams; ready_streams(); print('\u5929 e\u00e9')"
    environment = os.environ | {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stdout.decode("latin-1")) == (0, "? e\u00e9\n"), done.stderr


STREAMS = """
import os, subprocess, sys
from mlinterf_ds.runtime.program import main
def run(_):
    with open("file", "w") as file:
        assert file.fileno() > 2, "nothing else takes the number of a stream that is closed"
        print("a line", flush=True)
        print("another", flush=True)
        print("a third", file=sys.stderr, flush=True)
        subprocess.run(["true"], check=True)
    assert os.path.getsize("file") == 0
    return 0
main(run, [])
"""


@pytest.mark.parametrize(
    "streams, status, said",
    [
        ("| head -n 1", 0, "a line\na third\n"),
        ("2>&1 >/dev/null | true", 0, ""),
        (">&-", 0, "a third\n"),
        ("2>&-", 0, "a line\nanother\n"),
        ("<&- >&- 2>&-", 0, ""),
        (">/dev/full", 2, "\nerror: standard output or error cannot be written there: No space left on device\n"),
    ],
)
def test_streams_as_a_caller_leaves_them(streams: str, status: int, said: str, tmp_path: Path) -> None:
    script = f'{sys.executable} -c "$1" {streams}; exit ${{PIPESTATUS[0]}}'
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = ["bash", "-c", script, "bash", STREAMS]
    done = subprocess.run(
        line, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert (done.returncode, sorted(done.stdout)) == (status, sorted(said)), done.stdout


def test_a_process_that_a_run_starts_says_what_is_wrong_with_its_output(tmp_path: Path) -> None:
    code = f"{sys.executable} -m mlinterf_ds.data.prepare.synthetic '[[\"syn\"], 60, {{}}]'"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "corpora").touch()
    blocked, full = (
        "corpora: the synthetic corpus cannot be written there",
        "standard output or error cannot be written",
    )
    for folder, where, said in ((tmp_path / "file", "", blocked), (tmp_path, ">/dev/full", full)):
        line = ["bash", "-c", f"{code} {where}"]
        done = subprocess.run(line, env=environment, cwd=folder, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("command", ["launch/pretrain.py", "tools/prepare_corpus.py"])
def test_a_locale_of_ascii_alone_is_refused_with_the_remedy(command: str) -> None:
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = ["--out", "x", "en=gr\u00f6"] if "prepare" in command else ["--set", "name=gr\u00f6"]
    line = [sys.executable, str(ROOT / command), *words]
    done = subprocess.run(line, env=environment, cwd=ROOT, capture_output=True)
    said = done.stderr.decode()
    assert done.returncode and "unset PYTHONUTF8" in said and "Traceback" not in said, said


def test_results_are_written_before_they_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlinterf_ds import evaluate

    def unable(*_: Any, **__: Any) -> None:
        raise BrokenPipeError

    candidates = [[{"piece": "\u5929", "probability": 0.5}]]
    monkeypatch.setattr(evaluate, "in_group", lambda *_: nullcontext(SimpleNamespace(rank=0)))
    monkeypatch.setattr(evaluate, "Model", lambda *_: None)
    monkeypatch.setattr(evaluate, "fill", lambda *_: candidates)
    monkeypatch.setattr(evaluate, "print", unable, raising=False)
    with pytest.raises(BrokenPipeError):
        evaluate.main(["--checkpoint", "x", "--fill", "<mask>", "--language", "zh", "--out", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out").read_text("utf-8")) == candidates

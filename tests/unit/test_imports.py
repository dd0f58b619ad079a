"""The layout of the package, written down once: which room may import which, walked import by import."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "mlinterf_ds"

# A room (a folder or file of the package) imports only rooms of earlier lines.
LAYERS = [
    ["errors", "meta"],  # meta is the algorithm, which needs torch alone
    ["files", "ranks", "config"],
    ["sections"],
    ["runtime", "tracking", "plots"],
    ["data", "model"],
    ["engine"],
    ["tasks", "gradients", "pretrained"],
    ["export"],
    ["pretrain"],
    ["finetune", "evaluate"],
    ["results", "predict"],
    ["analysis"],
    ["study"],
]
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
# Who alone may import a room of this package, or a library.
ONLY = {
    "tracking": {"pretrain", "finetune", "evaluate", "analysis", "study"},  # the commands
    "meta": {"engine", "gradients"},
    "megatron": {"model", "runtime", "engine"},
    "mlflow": {"tracking", "export", "study"},
}
# The one file that may read a library's private names.
PRIVATE = [
    ("engine/zero.py", r"deepspeed\.runtime|\bds_(tensor|shape|numel|persist)\b|persistent_parameters"),
    ("runtime/parallel.py", r"parallel_state\._|\(parallel_state\)"),
]
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def modules(path: Path) -> Iterator[str]:
    """The modules that a file imports, in functions too, but not those for type checkers alone."""

    def walk(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.ImportFrom) and child.module:
                yield child.module
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            elif isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            yield from walk(child)

    return walk(ast.parse(path.read_text()))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rooms(path: Path) -> set[str]:
    """The rooms of this package and the libraries that a file imports."""
    names = [name.split(".") for name in modules(path)]
    return {parts[1] if parts[0] == PACKAGE.name else parts[0] for parts in names if parts != [PACKAGE.name]}


@pytest.mark.parametrize("name", LAYER)
def test_a_room_imports_only_rooms_below(name: str) -> None:
    for path in FILES:
        if room(path) == name:
            for other in rooms(path) - {name}:
                assert LAYER.get(other, -1) < LAYER[name], f"{path.relative_to(PACKAGE)} imports {other}"
                assert name in ONLY.get(other, {name}), f"{path.relative_to(PACKAGE)} imports {other}"


def test_every_room_has_a_layer() -> None:
    assert {room(path) for path in FILES} == LAYER.keys()


def test_the_algorithm_needs_torch_alone() -> None:
    standard = {"__future__", "math", "collections", "contextlib", "dataclasses", "typing"}
    for path in (PACKAGE / "meta").glob("*.py"):
        assert rooms(path) <= standard | {"torch", "meta"}, path


@pytest.mark.parametrize("home, private", PRIVATE)
def test_one_file_alone_reads_the_internals_of_a_library(home: str, private: str) -> None:
    assert re.search(private, (PACKAGE / home).read_text())
    for path in FILES:
        if str(path.relative_to(PACKAGE)) != home:
            assert not re.search(private, path.read_text()), path


def test_what_pretraining_needs_stays_small() -> None:
    """All files of this package that pretraining imports, directly or not, empty ones apart."""
    waiting, needed = [PACKAGE / "pretrain" / "main.py"], set()
    while waiting:
        path = waiting.pop()
        if path in needed:
            continue
        needed.add(path)
        for name in modules(path):
            first, *parts = name.split(".")
            if first == PACKAGE.name:
                bases = [PACKAGE.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1)]
                files = [file for base in bases for file in (base.with_suffix(".py"), base / "__init__.py")]
                waiting += [file for file in files if file.is_file()]
    assert not {"finetune", "analysis", "results", "study", "evaluate", "predict"} & {room(path) for path in needed}
    assert sum(len(path.read_text().splitlines()) for path in needed) < 12_000

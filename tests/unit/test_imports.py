"""Imports go one way: config <- parallel <- data, model, meta, tracking <- engine, tasks <- report, export <- analysis <- recipes."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "mlinterf_ds"
LAYERS = {
    "errors": 0, "files": 1, "ranks": 1, "config": 1, "runtime": 2, "data": 3, "model": 3, "meta": 3, "tracking": 3, "plots": 3,
    "engine": 4, "tasks": 4, "gradients": 5, "export": 6, "pretrained": 6, "pretrain": 7, "evaluate": 8, "finetune": 8,
    "results": 9, "analysis": 9, "study": 10,
}  # fmt: skip
FORBIDDEN = {
    "model": {"data", "meta", "tracking"},
    "data": {"model", "meta", "tracking"},
    "meta": {"data", "model", "tracking"},
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py")


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = node.module.split(".")
            if module[0] == "mlinterf_ds":
                found |= {module[1]} if len(module) > 1 else {alias.name for alias in node.names}
            else:
                found.add(module[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1 if alias.name.startswith("mlinterf_ds.") else 0] for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_layers(path: Path) -> None:
    mine = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert mine in LAYERS, f"{mine} has no layer: add it above"
    for other in imported(path) & LAYERS.keys() - {mine}:
        assert LAYERS[other] <= LAYERS[mine], f"{mine} imports {other}"
        assert other not in FORBIDDEN.get(mine, set()), f"{mine} imports {other}"


def test_the_algorithm_needs_torch_alone() -> None:
    standard = {"__future__", "math", "collections", "contextlib", "dataclasses", "typing"}
    for path in (PACKAGE / "meta").glob("*.py"):
        assert imported(path) <= standard | {"torch", "meta"}, path


@pytest.mark.parametrize(
    "home, private",
    [
        ("engine/zero.py", r"deepspeed\.runtime|\bds_(tensor|shape|numel|persist)\b|persistent_parameters"),
        ("runtime/parallel.py", r"parallel_state\._|\(parallel_state\)"),
    ],
)
def test_one_file_alone_reads_the_internals_of_a_library(home: str, private: str) -> None:
    assert re.search(private, (PACKAGE / home).read_text())
    for path in FILES:
        if str(path.relative_to(PACKAGE)) != home:
            assert not re.search(private, path.read_text()), path

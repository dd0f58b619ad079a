"""The source code that decides a job's numbers: all files of the package that its recipe imports, directly or through others.

The imports are read from the syntax trees, so nothing is imported here.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
RECIPES = {
    "pretrain": "mlinterf_ds.pretrain.main",
    "finetune": "mlinterf_ds.finetune.main",
    "analyze": "mlinterf_ds.analysis.main",
}
# These files start a run, watch it and show what it measured: no number depends on them.
IRRELEVANT = ("plots", "runtime/launchers.py", "runtime/restarts.py", "runtime/output.py", "tracking")


@functools.cache
def code_hash(kind: str) -> str:
    """SHA-256 of the code of a kind of job; comments and layout do not change it."""
    digest = hashlib.sha256()
    for path in imported_files(RECIPES[kind], without=IRRELEVANT):
        digest.update(f"{path.relative_to(PACKAGE).as_posix()}\n{ast.dump(_tree(path))}\n".encode())
    return digest.hexdigest()


def imported_files(module: str, without: tuple[str, ...] = ()) -> list[Path]:
    """The package's files that `module` imports, at once or inside functions, itself included, sorted by path.

    without: files and folders below the package that are left out, and not followed.
    """
    reached: set[Path] = set()
    waiting = _files_of(module)
    while waiting:
        path = waiting.pop()
        if path in reached or any(path.is_relative_to(PACKAGE / name) for name in without):
            continue
        reached.add(path)
        for name in _imports(_tree(path)):
            waiting += _files_of(name)
    return sorted(reached)


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _imports(node: ast.AST) -> Iterator[str]:
    """The dotted names that a syntax tree imports; names inside `if TYPE_CHECKING` are for the type checker alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module:
            yield from (f"{child.module}.{alias.name}" for alias in child.names)  # a module, or a name in one
        elif not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)):
            yield from _imports(child)


def _files_of(name: str) -> list[Path]:
    """The files of the package that importing a dotted name runs: each package on the way, and the module."""
    root, *parts = name.split(".")
    if root != PACKAGE.name:
        return []
    paths = [PACKAGE.joinpath(*parts[:count]) for count in range(len(parts) + 1)]
    files = [path / "__init__.py" for path in paths] + [path.with_suffix(".py") for path in paths[1:]]
    return [path for path in files if path.is_file()]

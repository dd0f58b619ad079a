"""Fixtures every test may use."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The files that take longest, the longest first: a worker of `-n 2 --dist loadfile` takes whole files, and none should begin a long
# one when the other has come to its end.
LONGEST = [
    "test_run_faults", "test_study", "test_meta", "test_tracking_faults", "test_pretrain", "test_fuzz", "test_bench",
    "test_finetune", "test_conflict", "test_layouts", "test_plan", "test_study_runner", "test_analyze",
    "test_corpus_faults", "test_altered_corpus", "test_export_finetuned", "test_interference", "test_growth",
    "test_finetune_layouts", "test_tracking", "test_export", "test_mlflow_browser", "test_models_in", "test_command",
    "test_evaluate", "test_two_hosts",
]  # fmt: skip

# The models and arrays of tests are small: a second thread costs more than it does, here and in every process started
# from here. It must be set before torch and numpy are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # pytest-xdist would begin with the files that hold the most tests
    if os.environ.get("PYTEST_XDIST_WORKER") == "gw1":  # in a fresh environment each of two workers compiles its half
        for package in ("scipy.stats", "matplotlib.figure", "hypothesis", "sqlalchemy.engine", "transformers.utils"):
            with contextlib.suppress(ImportError):
                importlib.import_module(package)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {f"{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real text and task data beside a developer's checkout; a test that needs it skips elsewhere."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs real data in {folder}")
    return folder


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, an untrained checkpoint, and `data`, tiny files of all tasks, in the languages te and as."""
    from tests.parity import finetune_bodies
    from tests.ranks import pool

    folder = tmp_path_factory.mktemp("ground")
    pool(1).run(finetune_bodies.pretrain, str(folder / "model"))
    finetune_bodies.write_data(folder / "data")
    return folder


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Makes this process the only rank of a process group, on one thread; a process joins a group once."""
    import torch

    from mlinterf_ds.runtime.parallel import Group

    group = Group(1, f"file://{tmp_path_factory.mktemp('rendezvous')}/file")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    group.leave()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that the test draws, which are laid out, and not written: that takes twice as long."""
    from mlinterf_ds.plots import style

    figures: list[Figure] = []

    def keep(figure: Figure, path: Path) -> None:
        figures.append(figure)
        figure.draw_without_rendering()

    monkeypatch.setattr(style, "save", keep)
    return figures

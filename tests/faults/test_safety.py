"""What files, neighbours on a machine and the network may not do."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from mlinterf_ds.errors import UserError
from mlinterf_ds.files import check_files, file_facts
from mlinterf_ds.runtime import launchers
from tests.ranks import pool

ROOT = Path(__file__).resolve().parents[2]
CODE = sorted(path for folder in ("mlinterf_ds", "tools", "launch") for path in (ROOT / folder).rglob("*.py"))
EXECUTE = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib", "yaml"}
UNPACK = {"extract", "extractall", "unpack_archive"}
CALLS = {"eval", "exec", "compile", "__import__"}


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_unpickled_or_executed(path: Path) -> None:
    """Checkpoints are safetensors and JSON, corpora arrays and JSON; of an archive single members are read, and none is
    unpacked; no shell reads a string."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in getattr(node, "names", [])] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not EXECUTE & {name.split(".")[0] for name in names}, names
        if isinstance(node, ast.Call):
            said = ast.unparse(node.func)
            assert said not in CALLS and said not in ("torch.load", "os.system", "os.popen"), said
            assert said.rpartition(".")[2] not in UNPACK, said
            for word in node.keywords:
                value = getattr(word.value, "value", None)
                assert not (word.arg in ("shell", "allow_pickle") and value is True), ast.unparse(node)


def test_a_checkpoints_list_of_files_cannot_lead_out_of_it(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "step-1"
    folder.mkdir()
    facts = file_facts(tmp_path / "secret")
    for name in ("../secret", str(tmp_path / "secret")):
        with pytest.raises(UserError, match=f"{folder}/secret is missing"):
            check_files(folder, {name: facts}, "")


def test_ranks_meet_in_a_folder_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers.tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv(launchers.ADDRESS, raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    place = tmp_path / f"mlinterf_ds-{os.getuid()}"
    assert launchers.rendezvous().startswith(f"file://{place}/")
    assert place.stat().st_mode & 0o777 == 0o700
    place.chmod(0o777)
    with pytest.raises(UserError, match="not a folder that is yours alone"):
        launchers.rendezvous()
    place.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="not a folder that is yours alone"):
        launchers.rendezvous()


def listening() -> list[str]:
    """Addresses (hexadecimal) at which this process accepts connections, after the ranks have talked to each other."""
    import torch
    import torch.distributed as dist

    dist.all_reduce(torch.ones(1))
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    mine = {link[8:-1] for link in links if link.startswith("socket:[")}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in mine:
                found.append(words[1].split(":")[0])
    return found


def test_ranks_of_one_host_listen_to_this_host_alone() -> None:
    loopback = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
    found = pool(2).run(listening)
    assert all(set(addresses) <= loopback for addresses in found), found
    assert any(found), "gloo's pairs listen: the test would see them"

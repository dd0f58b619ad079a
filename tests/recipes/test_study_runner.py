"""Running a study with a stand-in for the launcher: what is run, resumed, isolated and submitted."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from mlinterf_ds.errors import UserError
from mlinterf_ds.results.records import Records
from mlinterf_ds.study import folders, main, runner, worker
from mlinterf_ds.study.folders import is_complete, last_error, try_lock, wait_for_lock
from mlinterf_ds.tracking import Tracker
from tests import fake_launcher
from tests.commands import flags, wait_until
from tests.mlflow_server import free_port
from tests.ranks import joined, pool

ROOT = Path(__file__).resolve().parents[2]


def tables(folder: Path) -> dict[str, str]:
    files = [*sorted((folder / "tables").iterdir()), folder / "findings.md"]
    return {path.name: path.read_text() for path in files}


def started(folder: Path) -> list[str]:
    return (folder / "started").read_text().split()


def states(folder: Path) -> dict[str, str]:
    return {row["job"]: row["state"] for row in Records.load(folder / "records.json").status}


def write_unit_job(folder: Path, kind: str, units: str) -> None:
    """The job.json of a job whose units have one-letter names."""
    facts = [{"name": name, "arguments": []} for name in units]
    (folder / "job.json").write_text(json.dumps({"kind": kind, "tensor": 1, "units": facts}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted study of two seeds."""
    folder = tmp_path_factory.mktemp("whole")
    assert fake_launcher.study(str(folder), "seeds=0,1") == 0
    return folder


def test_every_job_runs_once_after_what_it_needs(whole: Path) -> None:
    names = started(whole)
    assert len(names) == len(set(names)) == 16
    for name in names:
        if name.startswith("finetune"):
            assert names.index(name.replace("finetune", "pretrain")) < names.index(name)
    records = Records.load(whole / "records.json")
    assert len(records.models) == 8 and {row["state"] for row in records.status} == {"finished"}
    # mono syn on both, mono target, and three of each joint model, for each seed
    assert len(records.scores) == 2 * (2 + 1 + 2 * 3)
    assert records.sizes["syn"]["sentences"] > 400


def test_numbers_reach_the_table(whole: Path) -> None:
    records = Records.load(whole / "records.json")
    joint = [s.score for s in records.scores if (s.variant, s.train, s.language) == ("joint", "syn", "syn-close")]
    mean = sum(joint) / 2
    assert f"{mean:.1f} ± {abs(joint[0] - joint[1]) / 2**0.5:.1f}" in tables(whole)["table2.md"]


def test_a_finished_study_starts_nothing(whole: Path) -> None:
    before, text = started(whole), tables(whole)
    assert fake_launcher.study(str(whole), "seeds=0,1") == 0
    assert started(whole) == before and tables(whole) == text


def test_a_larger_study_runs_only_what_is_new(whole: Path) -> None:
    before = started(whole)
    assert fake_launcher.study(str(whole), "seeds=0,1", "controls.compute=2", "variants=joint,adpt,meta_adpt") == 0
    new = started(whole)[len(before) :]
    assert {name.split(".")[1] for name in new} == {"meta_adpt", "adpt-compute"} and len(new) == 8
    assert fake_launcher.study(str(whole), "seeds=0,1") == 0  # and leaves the smaller one's report as it was


def test_a_failed_job_is_isolated_and_tried_again(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = tables(whole)
    (tmp_path / "broken").write_text("pretrain.adpt.close.seed1")
    assert fake_launcher.study(str(tmp_path), "seeds=0,1") == 1
    said = capsys.readouterr().out
    assert "pretrain.adpt.close.seed1: failed: error: the planted mistake" in said
    assert "finetune.adpt.close.seed1: blocked: needs pretrain.adpt.close.seed1" in said
    assert sorted(states(tmp_path).values()) == ["blocked"] + ["failed"] + ["finished"] * 14
    assert "the planted mistake" in (tmp_path / "report.html").read_text()
    (tmp_path / "broken").unlink()
    before = started(tmp_path)
    assert fake_launcher.study(str(tmp_path), "seeds=0,1") == 0
    assert started(tmp_path)[len(before) :] == ["pretrain.adpt.close.seed1", "finetune.adpt.close.seed1"]
    assert tables(tmp_path) == wanted


def test_a_killed_retry_does_not_give_the_last_attempts_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """done.json and the log tell of an earlier failure; this attempt dies without a word."""
    from mlinterf_ds.config import load_config
    from mlinterf_ds.study.config import StudyConfig
    from mlinterf_ds.study.jobs import Job, Model, Unit

    config = load_config(StudyConfig, ["study_ci"], ["parallel=1"])
    units = (Unit("a", (), {}), Unit("b", (), {}))
    job = Job("pretrain.x", "pretrain", Model("s", "pair", ("en", "sw"), "joint", 0), units, (), "0" * 64)
    folder = tmp_path / job.folder
    folder.mkdir(parents=True)
    before = {"a": {"state": "finished", "seconds": 1.0}, "b": {"state": "failed", "reason": "of yesterday"}}
    (folder / "done.json").write_text(json.dumps({"units": before, "seconds": 9.0}))
    (folder / "launch.log").write_text("error: of yesterday\n")
    script = "import os; os.kill(os.getpid(), 9)"

    def write(job: Job) -> Path:
        return folders.write_job(job, config, tmp_path, "zero1.json", None)

    monkeypatch.setattr(folders, "launch_command", lambda *_: [sys.executable, "-c", script])
    (found,) = runner.run([job], config, tmp_path, write)
    assert found.state == "failed" and found.reason.startswith("exit status -9") and "yesterday" not in found.reason
    assert list(json.loads((folder / "done.json").read_text())["units"]) == ["a"]  # what is finished stays


def test_a_job_gets_the_threads_and_accelerators_of_its_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    given: list[tuple[str, str]] = []

    class Started:
        def __init__(self, words: list[str], env: dict[str, str], **_: object) -> None:
            given.append((env["OMP_NUM_THREADS"], env["CUDA_VISIBLE_DEVICES"]))
            self.pid = os.getpid()

    monkeypatch.setattr(runner.subprocess, "Popen", Started)
    monkeypatch.setattr(runner.os, "sched_setaffinity", lambda *_: None)
    job = types.SimpleNamespace(folder="job")
    (tmp_path / "job").mkdir()
    for ranks in (1, 2, 16):
        slot = runner.Slot(list(range(8)), {"CUDA_VISIBLE_DEVICES": f"of {ranks}"})
        runner._start(slot, job, [], tmp_path, ranks)  # type: ignore[arg-type]
        slot.log.close()
    assert given == [("8", "of 1"), ("4", "of 2"), ("1", "of 16")]


def test_accelerators_are_shared_out_to_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs that run at once have accelerators of their own, by the names that the user's environment gives them."""
    from mlinterf_ds.config import load_config
    from mlinterf_ds.study.config import StudyConfig

    def names(*settings: str) -> list[str]:
        shares = runner.slots(load_config(StudyConfig, ["study_ci"], list(settings)))
        return [slot.accelerators["CUDA_VISIBLE_DEVICES"] for slot in shares]

    monkeypatch.setattr(runner, "accelerators", lambda: ("CUDA_VISIBLE_DEVICES", ["2", "3", "GPU-a", "GPU-b"]))
    assert names() == ["2", "3", "GPU-a", "GPU-b"]
    assert names("ranks=2") == ["2,3", "GPU-a,GPU-b"]
    assert names("ranks=3") == ["2,3,GPU-a"]
    assert names("ranks=2", "parallel=3") == ["2,3", "GPU-a,GPU-b", "2,3"]
    with pytest.raises(UserError, match=r"ranks=5: this machine has 4 accelerators"):
        names("ranks=5")
    plan = main.Study(load_config(StudyConfig, ["study_ci"], [f"output={tmp_path}"]), "ds_configs/zero1.json").show()
    assert "left, GPU-minutes" in plan and "with 4 at once" in plan


def test_accelerators_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    device = types.SimpleNamespace(
        device_name=lambda: "cuda", device_count=lambda: 2, visible_devices_envs=lambda: ["CUDA_VISIBLE_DEVICES"]
    )
    monkeypatch.setattr(runner.torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: device)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert runner.accelerators() == ("CUDA_VISIBLE_DEVICES", ["0", "1"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,MIG-x,9")  # CUDA does not know the last one
    assert runner.accelerators() == ("CUDA_VISIBLE_DEVICES", ["5", "MIG-x"])
    device.device_name = lambda: "cpu"
    assert runner.accelerators()[1] == []


def test_a_job_of_several_ranks(tmp_path: Path) -> None:
    """The launcher gives each rank its number, and leaves the accelerators as the environment has them."""
    words = folders.launch_command(tmp_path, 2, str(free_port()))
    script, names = tmp_path / "rank.py", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES"]
    script.write_text(
        f"import os; open(f'{tmp_path}/{{os.environ[\"RANK\"]}}', 'w').write(' '.join(os.environ[name] for name in {names}))"
    )
    words = [*words[: words.index(str(folders.SCRIPT))], str(script)]
    subprocess.run(words, env=os.environ | {"CUDA_VISIBLE_DEVICES": "5,7"}, timeout=120, check=True)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["0 0 2 5,7", "1 1 2 5,7"]


def test_the_reason_of_a_job_of_several_ranks(tmp_path: Path) -> None:
    """torchrun ends its report with an error of its own."""
    log = tmp_path / "launch.log"
    log.write_text("error: corpus=x: no such folder\ntorch.distributed...errors.ChildFailedError: \n  rank: 0\n")
    assert last_error(log) == "error: corpus=x: no such folder"
    log.write_text("ValueError: nine\ntorch.distributed...errors.ChildFailedError: \n")
    assert last_error(log) == "ValueError: nine"


def test_two_studies_don_t_share_a_folder(tmp_path: Path) -> None:
    with try_lock(tmp_path) as free:
        assert free
        with pytest.raises(UserError, match="another study works on"):
            fake_launcher.study(str(tmp_path))
    with try_lock(tmp_path) as free:
        assert free


def test_a_study_that_is_killed_twice_ends_with_the_same_tables(whole: Path, tmp_path: Path) -> None:
    words = [sys.executable, fake_launcher.__file__, "study", str(tmp_path), "seeds=0,1"]
    for how, least in ((signal.SIGKILL, 3), (signal.SIGTERM, 6)):
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(lambda least=least: len(list(tmp_path.glob("jobs/*/done.json"))) >= least, 120)
        process.send_signal(how)
        process.wait(60)
        assert process.returncode and not (tmp_path / "report.html").exists()
        assert least <= len(list(tmp_path.glob("jobs/*/done.json"))) < 16
    assert fake_launcher.study(str(tmp_path), "seeds=0,1") == 0
    assert len(started(tmp_path)) <= 16 + 2  # those that were running
    assert tables(tmp_path) == tables(whole)


# --- inside a job ------------------------------------------------------------------------------------------------------
def test_a_place_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output=.*file: cannot write there"), try_lock(tmp_path / "file"):
        pass


def cleared(folder: str, kind: str) -> tuple[list[str], list[str]]:
    """On a rank of the pool, a recipe that leaves checkpoints: (folders that this rank removed, what is left)."""
    from unittest import mock

    import torch.distributed as dist

    place, removed, really = Path(folder) / "unit", list[str](), shutil.rmtree

    def recipe(arguments: list[str], group: object) -> int:
        assert (place / "old").exists() == (kind == "finetune"), "what a half-done analysis left is gone, on every rank"
        dist.barrier()
        (place / "seed0/checkpoints").mkdir(parents=True, exist_ok=True)
        return 0

    def remove(path: Path, **options: bool) -> None:
        removed.append(path.name)
        really(path, **options)

    (place / "old").mkdir(parents=True, exist_ok=True)
    dist.barrier()
    with (
        mock.patch.object(worker.importlib, "import_module", lambda _: types.SimpleNamespace(main=recipe)),
        mock.patch.object(worker.shutil, "rmtree", remove),
    ):
        worker._run(kind, place, [], joined())
    return removed, sorted(path.name for path in place.rglob("*"))


@pytest.mark.parametrize(
    "kind, removed, left",
    [("finetune", ["checkpoints"], ["old", "seed0"]), ("analyze", ["unit"], ["checkpoints", "seed0"])],
)
def test_one_of_several_ranks_clears_up(kind: str, removed: list[str], left: list[str], tmp_path: Path) -> None:
    assert pool(2).run(cleared, str(tmp_path), kind) == [(removed, left), ([], left)]


def test_a_job_waits_for_another_process_that_works_on_it(tmp_path: Path) -> None:
    script = f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; from mlinterf_ds.study.folders import wait_for_lock\n"
    script += f"place = Path({str(tmp_path)!r})\n"
    script += "with wait_for_lock(place): print('in', flush=True); time.sleep(1); (place / 'done').touch()"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"in\n"
    with wait_for_lock(tmp_path):
        assert (tmp_path / "done").exists(), "it was let in while the other still worked"
    assert process.wait(10) == 0


def test_every_rank_waits_for_its_like(one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what another process finished meanwhile is known."""
    write_unit_job(tmp_path, "finetune", "")
    held: list[int] = []

    @contextlib.contextmanager
    def waiting(folder: Path, rank: int) -> Iterator[None]:
        held.append(rank)
        read.clear()  # what was read before the wait doesn't count
        yield

    read: list[Path] = []
    monkeypatch.setattr(worker, "wait_for_lock", waiting)
    monkeypatch.setattr(worker, "finished_units", lambda folder: read.append(folder) or {})
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert worker.work(tmp_path) == 0 and read
    assert held == [0, 1]


def test_only_a_whole_summary_is_a_finished_unit(tmp_path: Path) -> None:
    assert not is_complete(tmp_path)
    for text, wanted in (("{", False), ('{"finished": false}', False), ('{"finished": true}', True), ("{}", True)):
        (tmp_path / "summary.json").write_text(text)
        assert is_complete(tmp_path) is wanted


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process group of one, without the seconds it takes to import one."""
    stand_in = types.SimpleNamespace(own_group=lambda parallel: contextlib.nullcontext(types.SimpleNamespace(world=1)))
    monkeypatch.setitem(sys.modules, "mlinterf_ds.runtime.session", stand_in)


def test_a_unit_that_fails_leaves_the_others_be(
    one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    broken = {"b"}

    def run(kind: str, folder: Path, arguments: list[str], group: object) -> None:
        ran.append(folder.name)
        if folder.name in broken:
            raise UserError("no such file")
        folder.mkdir()
        (folder / "summary.json").write_text('{"finished": true}')

    monkeypatch.setattr(worker, "_run", run)
    write_unit_job(tmp_path, "finetune", "abc")
    assert worker.work(tmp_path) == 1 and ran == ["a", "b", "c"]
    done = json.loads((tmp_path / "done.json").read_text())["units"]
    assert {name: facts["state"] for name, facts in done.items()} == {"a": "finished", "b": "failed", "c": "finished"}
    assert done["b"]["reason"] == "UserError: no such file"
    broken.clear()
    assert worker.work(tmp_path) == 0 and ran == ["a", "b", "c", "b"]  # only what failed runs again
    before = (tmp_path / "done.json").read_bytes()
    assert worker.work(tmp_path) == 0 and (tmp_path / "done.json").read_bytes() == before


def test_a_unit_that_is_asked_to_end_ends_the_job(
    one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def run(kind: str, folder: Path, arguments: list[str], group: object) -> None:
        ran.append(folder.name)
        folder.mkdir()
        (folder / "summary.json").write_text('{"finished": false}')

    monkeypatch.setattr(worker, "_run", run)
    write_unit_job(tmp_path, "pretrain", "ab")
    assert worker.work(tmp_path) == 1 and ran == ["a"]


def late(folder: str) -> int:
    """`work` on a rank of the pool, whose unit's summary rank 0 alone sees, as right after it has written it."""

    def run(kind: str, place: Path, *_: object) -> None:
        if joined().rank == 0:
            place.mkdir()
            (place / "summary.json").write_text('{"finished": true}')

    seen, work = worker.is_complete, mock.patch.object(worker, "_run", run)
    sees = mock.patch.object(worker, "is_complete", lambda path: joined().rank == 0 and seen(path))
    group = mock.patch("mlinterf_ds.runtime.session.own_group", lambda parallel: contextlib.nullcontext(joined()))
    with work, sees, group:
        return worker.work(Path(folder))


def test_ranks_agree_that_a_unit_has_finished(tmp_path: Path) -> None:
    """Rank 0 writes the summary; a rank that looked for it too early would end the job as failed."""
    write_unit_job(tmp_path, "pretrain", "ab")
    for _ in range(2):  # the second time it has finished already
        assert pool(2).run(late, str(tmp_path)) == [0, 0]


# --- Slurm -------------------------------------------------------------------------------------------------------------
SBATCH = """#!/bin/bash
echo "$@" >> "$SBATCH_LOG"
echo $((100 + $(wc -l < "$SBATCH_LOG")))";cluster"
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with a stand-in for sbatch; its log."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(SBATCH)
    (folder / "sbatch").chmod(0o755)
    (folder / "squeue").write_text('#!/bin/bash\ncat "$SBATCH_LOG.queue"\n')
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SBATCH_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


def submit(folder: Path, *settings: str) -> int:
    words = [f"output={folder}", "tracking.enabled=false", *settings]
    options = folder.parent / "sbatch.toml"
    options.write_text('sbatch = ["--partition=cpu"]')
    recipe = ["--recipe", "study_ci", "--recipe", str(options), "--executor", "slurm"]
    return main.main([*recipe, *flags(*words)])


def test_slurm_jobs_depend_on_what_they_need(slurm: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    assert submit(out) == 0
    ids = json.loads((out / "slurm.json").read_text())
    lines = dict(zip(ids, slurm.read_text().splitlines(), strict=True))
    assert list(ids.values()) == [str(101 + n) for n in range(9)]
    assert "--dependency" not in lines["pretrain.joint.close.seed0"]
    need = ids["pretrain.joint.close.seed0"]
    assert f"--dependency=afterok:{need} " in lines["finetune.joint.close.seed0"]
    everything = ":".join(list(ids.values())[:-1])
    assert f"--dependency=afterany:{everything} " in lines["report"]
    script = Path(lines["finetune.joint.close.seed0"].split()[-1]).read_text()
    assert "#SBATCH --partition=cpu" in script and "#SBATCH --job-name=study_ci.finetune.joint.close.seed0" in script
    assert re.search(r"exec env RANK=0 WORLD_SIZE=1 .* \S*launch/study.py --job \S*finetune.joint", script)
    assert "--report" in Path(lines["report"].split()[-1]).read_text()
    assert subprocess.run(["bash", "-n", lines["report"].split()[-1]]).returncode == 0


def test_slurm_submits_only_what_is_not_finished(slurm: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    assert fake_launcher.study(str(out)) == 0
    (broken,) = out.glob("jobs/finetune.adpt.close.seed0-*/pos-syn.*/summary.json")
    broken.unlink()
    assert submit(out) == 0
    ids = json.loads((out / "slurm.json").read_text())
    assert list(ids) == ["finetune.adpt.close.seed0", "report"]
    assert "afterok" not in slurm.read_text()


def test_slurm_keeps_what_is_queued(slurm: Path, tmp_path: Path) -> None:
    """A second submission finds the first one's jobs, but for one that has left the queue without results."""
    out = tmp_path / "study"
    assert submit(out, "ranks=2") == 0
    first = json.loads((out / "slurm.json").read_text())
    scripts = [Path(line.split()[-1]).read_text() for line in slurm.read_text().splitlines()]
    assert all("#SBATCH --cpus-per-task=2\n" in script for script in scripts)
    several = r"exec \S*python\S* -m torch.distributed.run --nproc-per-node 2 .*--master-port \$\(\(.*\)\) .*launch/study.py --job \S*pretrain.mono"
    assert re.search(several, scripts[0])
    gone = "finetune.joint.close.seed0"
    slurm.with_name("log.queue").write_text("\n".join(n for name, n in first.items() if name != gone))
    (out / "slurm.json").unlink()  # as after an error midway
    assert submit(out, "ranks=2") == 0
    second = json.loads((out / "slurm.json").read_text())
    assert {name for name in first if first[name] != second[name]} == {gone, "report"}
    assert len(slurm.read_text().splitlines()) == len(first) + 2


def test_a_report_alone_tells_of_failed_jobs(whole: Path, tmp_path: Path) -> None:
    """As the report that Slurm starts does: what failed and what it held up, by the jobs' folders."""
    (tmp_path / "broken").write_text("pretrain.adpt.close.seed0")
    assert fake_launcher.study(str(tmp_path)) == 1
    (job,) = tmp_path.glob("jobs/pretrain.adpt.close.seed0-*")
    assert fake_launcher.study(str(tmp_path), report=True) == 1
    rows = {row["job"]: row for row in Records.load(tmp_path / "records.json").status}
    assert rows["pretrain.adpt.close.seed0"]["state"] == "failed"
    assert "planted mistake" in rows["pretrain.adpt.close.seed0"]["reason"]
    assert rows["finetune.adpt.close.seed0"]["state"] == "blocked"
    with try_lock(job):  # it is tried again at this moment
        assert fake_launcher.study(str(tmp_path), report=True) == 0
    known = states(tmp_path)
    assert known["pretrain.adpt.close.seed0"] == known["finetune.adpt.close.seed0"] == "waiting"


def test_a_report_after_an_edit_shows_what_there_is_and_says_so(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlinterf_ds.study import plan

    shutil.copytree(whole, tmp_path / "study")
    monkeypatch.setattr(plan, "code_hash", lambda kind: "edited")
    assert fake_launcher.study(str(tmp_path / "study"), "seeds=0,1", report=True) == 0
    after, note = tables(tmp_path / "study"), "16 of 16 jobs come from earlier code, settings or data"
    assert note in after["table2.md"]
    without = {name: [line for line in text.splitlines() if note not in line] for name, text in after.items()}
    assert without == {name: text.splitlines() for name, text in tables(whole).items()}


def test_a_report_alone_reaches_the_studys_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fake_launcher.study(str(tmp_path)) == 0
    opened: list[str | None] = []
    monkeypatch.setattr(main.mlflow_run, "start", lambda *_: opened.append("run") or Tracker.off())
    assert fake_launcher.study(str(tmp_path), report=True) == 0 and opened == ["run"]
    with try_lock(tmp_path):  # the study goes on: its own process writes to the run
        assert fake_launcher.study(str(tmp_path), report=True) == 0 and opened == ["run"]
    (tmp_path / "study.json").unlink()
    assert fake_launcher.study(str(tmp_path), report=True) == 0 and opened == ["run"]


def test_without_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no sbatch on PATH"):
        submit(tmp_path / "study")

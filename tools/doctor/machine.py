"""Checks of the hardware: what DeepSpeed computes on, in which precisions, and free space on disks and in shared memory."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from tools.doctor.check import Check

GIB = 2**30


def accelerator() -> list[Check]:
    """What DeepSpeed computes on, and in which precisions."""
    try:
        from deepspeed.accelerator import get_accelerator

        from mlinterf_ds.engine.precision import bf16_arithmetic, choose_precision

        device = get_accelerator()
        kind, count = device.device_name(), device.device_count()
        fast = [name for name, has in (("fp16", device.is_fp16_supported()), ("bf16", bf16_arithmetic())) if has]
        choice = choose_precision("auto", {})[0]
    except Exception as error:  # a broken driver or package can raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return [Check("accelerator", "FAIL", reason, "mend this first: `import deepspeed` must work")]
    if kind == "cpu" and shutil.which("nvidia-smi"):
        remedy = "this torch cannot use the GPUs: install a CUDA build of the same version of torch"
        checks = [Check("accelerator", "WARN", "cpu, although nvidia-smi is installed", remedy)]
    else:
        checks = [Check("accelerator", "OK", f"{count} x {kind}", alike=True)]
    if unusable := unlaunchable(os.environ.get("CUDA_VISIBLE_DEVICES")):
        checks.append(unusable)
    precisions = f"{', '.join([*fast, 'fp32'])}; train.precision=auto takes {choice}"
    slow = "" if fast else "without 16-bit arithmetic steps take about twice as long: use a device that has it"
    return [*checks, Check("precision", "OK" if fast else "WARN", precisions, slow)]


def unlaunchable(devices: str | None) -> Check | None:
    """A warning for a CUDA_VISIBLE_DEVICES that DeepSpeed's launcher cannot read: -1, or names of GPUs (GPU-uuid, MIG-uuid)."""
    if not devices or all(word.strip().isdecimal() for word in devices.split(",")):
        return None
    remedy = "`deepspeed launch/...` takes numbers only: add --num_gpus N, use torchrun or plain python, or unset it"
    return Check("visible devices", "WARN", f"CUDA_VISIBLE_DEVICES={devices}", remedy)


def space(folder: Path, name: str, fail: float, warn: float, remedy: str) -> Check:
    """Free space in `folder`, or in the nearest folder above it that exists; FAIL and WARN below so many GiB."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / GIB
    status = "FAIL" if free < fail else "WARN" if free < warn else "OK"
    return Check(name, status, f"{free:,.1f} GiB free in {folder}", "" if status == "OK" else remedy)


def storage(output: Path) -> list[Check]:
    """Free space for runs written to `output`, for temporary files, and in shared memory."""
    remedy = "a checkpoint takes 12 bytes a parameter: free some space, or set output= to a larger disk"
    checks = [space(output.resolve(), "disk", 1, 20, remedy)]
    checks.append(space(Path(tempfile.gettempdir()), "temporary files", 0.1, 1, "free some space, or set TMPDIR"))
    if Path("/dev/shm").is_dir():
        remedy = "the ranks of a host exchange data through it: start a container with --shm-size=8g"
        checks.append(space(Path("/dev/shm"), "shared memory", 0.06, 1, remedy))
    return checks

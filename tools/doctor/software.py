"""Checks of what is installed: Python and the packages of pyproject.toml; and of locks that a build left behind."""

from __future__ import annotations

import importlib.metadata
import sys
import tomllib

from tools.doctor.check import ROOT, Check


def versions() -> list[Check]:
    """Compares Python and every package of pyproject.toml with the version that it asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = project["requires-python"].removeprefix(">=")
    version = ".".join(map(str, sys.version_info[:3]))
    enough = sys.version_info[:2] >= tuple(map(int, wanted.split(".")))
    remedy = "" if enough else f"install Python {wanted} or newer"
    checks = [Check("python", "OK" if enough else "FAIL", version, remedy, alike=True)]
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return [*checks, Check("packages", "FAIL", "packaging is not installed", "pip install -e .")]
    for line in project["dependencies"]:
        requirement = Requirement(line)
        remedy = f"pip install '{line}'"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            checks.append(Check(requirement.name, "FAIL", "not installed", remedy))
            continue
        if requirement.specifier.contains(version, prereleases=True):  # 2.13.0+cpu is a 2.13.0
            checks.append(Check(requirement.name, "OK", version, alike=True))
        else:
            mismatch = f"{version}, pyproject.toml asks for {requirement.specifier}"
            checks.append(Check(requirement.name, "FAIL", mismatch, remedy, alike=True))
    return checks


def locks() -> list[Check]:
    """Looks for locks that a killed build of an extension left behind."""
    from mlinterf_ds.runtime.output import stale_locks

    stale = stale_locks()
    if not stale:
        return [Check("build locks", "OK", "none left behind")]
    remedy = "DeepSpeed would wait for them for ever: remove the files (the launchers under launch/ do so themselves)"
    return [Check("build locks", "WARN", ", ".join(map(str, stale)), remedy)]

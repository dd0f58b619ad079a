"""One line of the doctor's report, and the folder of the repository.

The doctor must run where packages are missing: its files import the standard library alone, checks import the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Check:
    """The outcome of one check on one host."""

    name: str
    status: str  # OK; WARN: a run works, or only some things do not; FAIL: a run would not start or would break
    found: str  # what the check saw
    remedy: str = ""  # what to do about it; empty where the status is OK
    host: str = ""
    alike: bool = False  # whether `found` must be the same on every host

"""Parameters, tags, versions and addresses in the form that MLflow accepts, without secrets."""

from __future__ import annotations

import contextlib
import getpass
import importlib.metadata
import itertools
import json
import os
import platform
import posixpath
import re
import subprocess
import sys
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# MLflow 3's limits (mlflow.utils.validation): longer values are cut here, so that all versions of the server show the same.
MAX_PARAMETER = 6000
MAX_TAG = 8000
MAX_NAME = 250

SECRET_WORDS = {"password", "passwd", "passphrase", "secret", "secrets", "token", "credential", "credentials", "apikey"}
SECRET_KEYS = {"api", "access", "private", "secret", "encryption", "auth"}  # followed by the word "key"
HIDDEN = "***"
_URI_USER = re.compile(r"(?<=://)[^/\s?#]+@")
_URI_QUERY = re.compile(
    r"([?&;][\w.-]*(?:token|secret|password|passwd|key|signature)[\w.-]*=)[^&\s'\"]+", re.IGNORECASE
)


def is_secret(name: str) -> bool:
    """Whether `name` reads like a credential's: `hf_token`, `apiKey`, `AWS_SECRET_ACCESS_KEY`, but not `tokenizer`."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    parts = [part for part in re.split(r"[^a-z0-9]+", words) if part]
    pairs = itertools.pairwise(parts)
    return not SECRET_WORDS.isdisjoint(parts) or any(a in SECRET_KEYS and b == "key" for a, b in pairs)


def scrub(text: str) -> str:
    """`text` without secrets: users and passwords in URIs, and values of environment variables named like a credential."""
    text = _URI_QUERY.sub(rf"\1{HIDDEN}", _URI_USER.sub("", text))
    for name, value in os.environ.items():
        if len(value) >= 6 and value in text and is_secret(name):
            text = text.replace(value, HIDDEN)
    return text


def first_line(error: BaseException, limit: int = 300) -> str:
    """An error's class and the first line of its message, without secrets, for warnings and tags."""
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return scrub(f"{type(error).__name__}: {message}" if message else type(error).__name__)[:limit]


def clean_name(name: str) -> str:
    """`name` with `_` for every character that MLflow refuses; slashes stay, because they group MLflow's charts."""
    name = posixpath.normpath(re.sub(r"[^\w.\- :/]", "_", str(name))).lstrip("/").replace("../", "")
    return (name if name not in ("", ".", "..") else "_")[-MAX_NAME:]


def _without_secrets(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _without_secrets(str(name), inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_secrets(key, inner) for inner in value]
    # `mask_token_id = 4` is no secret, but a password may be a number.
    number = isinstance(value, int | float) and "token" in key.lower()
    return HIDDEN if is_secret(key) and not (value is None or isinstance(value, bool) or number) else value


def flatten(parameters: Mapping[str, Any]) -> dict[str, str]:
    """Nested parameters as flat ones: keys joined by dots, values cut to MLflow's limit, credentials hidden."""
    flat: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for name, inner in value.items():
                walk(f"{prefix}.{name}" if prefix else str(name), inner)
            return
        text = json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else str(value)
        text = scrub(text)
        flat[clean_name(prefix)] = text if len(text) <= MAX_PARAMETER else text[: MAX_PARAMETER - 1] + "…"

    walk("", _without_secrets("", parameters))
    return flat


def tidy_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags as MLflow accepts them, credentials hidden."""
    return {clean_name(k): HIDDEN if is_secret(k) else scrub(str(v))[:MAX_TAG] for k, v in tags.items()}


def dataset(path: Path, digest: str, context: str) -> dict[str, str]:
    """A data set for `Tracker.start`: a file or folder, the hash of its contents, and what the run does with it."""
    return {"name": path.name, "digest": digest, "source": str(path), "context": context}


def environment_facts() -> dict[str, str]:
    """Versions of Python and packages (from their metadata, without importing them), host name, and the checkout's commit."""
    facts = {"python": platform.python_version(), "host": platform.node(), "platform": platform.platform()}
    for package in ("mlinterf_ds", "torch", "deepspeed", "megatron-core", "mlflow", "numpy", "sentencepiece"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[package] = importlib.metadata.version(package)
    return facts | _git_facts(Path(__file__).resolve().parents[2])


def user_name() -> str:
    """The user's name; in a container where nobody gave the user one, its number."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return str(os.getuid())


def source_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """MLflow's own tags of who started a run and with what; tags: the run's, which may name the commit (`environment_facts`)."""
    commit = {"mlflow.source.git.commit": tags["git_commit"]} if "git_commit" in tags else {}
    started = {"mlflow.source.name": Path(sys.argv[0]).name, "mlflow.source.type": "LOCAL"}
    return {"mlflow.user": user_name()} | started | commit


def _git_facts(checkout: Path) -> dict[str, str]:
    """`git_commit` and `git_dirty` of a checkout; empty if the folder is not the top of a git working tree."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=True
        ).stdout.strip()

    try:
        # An installed package may lie inside another repository, whose commit says nothing about the package.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != checkout:
            return {}
        commit = git("rev-parse", "HEAD")
        # Only changes of the code count, not runs and databases beside it.
        changes = git("status", "--porcelain", "--", "mlinterf_ds", "launch", "tools")
        return {"git_commit": commit, "git_dirty": str(bool(changes)).lower()}
    except (OSError, subprocess.SubprocessError):
        return {}


def tracking_uri() -> str:
    """MLflow's address: MLFLOW_TRACKING_URI, else an SQLite file in the working directory. SQLite paths are absolute."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        return sqlite_uri(Path.cwd()) + "/" + uri.removeprefix("sqlite:///")
    return uri


def sqlite_uri(path: Path) -> str:
    """The address of an SQLite file, in which SQLAlchemy takes %xx for a character and ? for the end of the path."""
    return f"sqlite:///{str(path).replace('%', '%25').replace('?', '%3F')}"


def sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite address, as SQLAlchemy reads it; None for any other address."""
    rest = uri.removeprefix("sqlite:///")
    return None if rest == uri else Path(urllib.parse.unquote(rest.partition("?")[0]))

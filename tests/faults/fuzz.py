"""Damage, and the rule for readers under it: a UserError that names the file, or a right result; in bounded time."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mlinterf_ds.errors import UserError

SECONDS = 10.0  # of processor time a case

STRANGE = st.sampled_from(
    [None, True, False, 0, 1, -1, -7, 10**30, 2**63, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan"), "", "0", "x",
     "../x", "/etc/passwd", "a/b", "x" * 5000, "a\0b", "\u202e", "\ud800", "auto", "none", "en", [], [1], ["en", "en"],
     [[]], {}, {"a": 1}, {"file": "../../x"}]
)  # fmt: skip
# (kind, where in the text as a share of it, how many bytes, which noise)
Wound = tuple[str, float, int, int]
WOUNDS = st.tuples(
    st.sampled_from(["flip", "cut", "drop", "repeat", "noise", "swap", "line"]),
    st.floats(0, 1, exclude_max=True),
    st.integers(1, 40),
    st.integers(0, 2**32 - 1),
)


def wounded(data: bytes, wounds: list[Wound]) -> bytes:
    """Flips of a bit, cuts of the end, stretches lost, repeated, made noise or exchanged, lines repeated."""
    for kind, share, length, noise in wounds:
        at = int(share * len(data))
        head, piece, rest = data[:at], data[at : at + length], data[at + length :]
        if kind == "flip" and piece:
            data = head + bytes([piece[0] ^ (1 << noise % 8)]) + data[at + 1 :]
        elif kind == "cut":
            data = head
        elif kind == "drop":
            data = head + rest
        elif kind == "repeat":
            data = head + piece + piece + rest
        elif kind == "noise":
            data = head + noise.to_bytes(4, "little") + rest
        elif kind == "swap":
            data = head + rest[:length] + piece + rest[length:]
        elif kind == "line":
            lines = data.split(b"\n")
            lines.insert(noise % len(lines), lines[at % len(lines)])
            data = b"\n".join(lines)
    return data


def places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a tree of objects and lists, the tree itself apart."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path for key, value in items for path in [(*at, key), *places(value, (*at, key))]]


def mutated(tree: Any, number: int, how: str, value: Any) -> Any:
    """The tree with the value at one place replaced, dropped, doubled, or given an unknown neighbour."""
    tree = json.loads(json.dumps(tree))
    paths = places(tree)
    *parents, key = paths[number % len(paths)]
    holder = tree
    for parent in parents:
        holder = holder[parent]
    if how == "replace":
        holder[key] = value
    elif how == "drop":
        del holder[key]
    elif isinstance(holder, list):
        holder.insert(key, holder[key])
    else:
        holder["unknown"] = holder[key]
    return tree


MUTATIONS = st.tuples(st.integers(0, 10**6), st.sampled_from(["replace", "replace", "drop", "more"]), STRANGE)


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """A case that computes for longer is a hang."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS:g} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def cases(count: int, strategy: st.SearchStrategy[Any], case: Callable[[Any], bool]) -> None:
    """`count` cases or more, the same ones always; `case` says whether its input was refused. Some must be, not all."""
    refused: list[bool] = []

    @settings(
        max_examples=count, derandomize=True, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def run(drawn: Any) -> None:
        with limited():
            refused.append(case(drawn))

    run()
    assert len(refused) >= count, f"only {len(refused)} cases were run"
    assert 0 < sum(refused) < len(refused), f"{sum(refused)} of {len(refused)} cases refused: nothing was tested"


def refuses(read: Callable[[], Any], *names: str | Path) -> bool:
    """Whether reading ends with a UserError, which must say one of these names."""
    try:
        read()
    except UserError as error:
        said = str(error)
        assert any(str(name) in said for name in names), f"names none of {names}: {said[:500]}"
        return True
    return False

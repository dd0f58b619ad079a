"""Random numbers for synthetic examples: a function of the language, the kind of example, the split, the seed and the
example's number."""

import hashlib
from collections.abc import Iterator

import numpy as np

from mlinterf_ds.data.synthetic.grammar import UNIFORMS, Draw
from mlinterf_ds.data.synthetic.language import SyntheticLanguage
from mlinterf_ds.errors import UserError

BLOCK = 256  # examples whose random numbers are made at once


def draws(
    spoken: SyntheticLanguage, kind: str, count: int, seed: int, split: str, width: int = UNIFORMS
) -> Iterator[Draw]:
    """Yields the random choices, `width` at most, of each of the examples 0 to `count - 1`.

    Each language has its own numbers for `train`; all languages share those of any other split. Raises UserError for a
    negative count.
    """
    if count < 0:
        raise UserError(f"synthetic language '{spoken.name}': asked for {count} examples; ask for 0 or more")
    owner = spoken.name if split == "train" else "every language"
    # hashlib, not hash(): the latter differs between processes.
    key = int.from_bytes(hashlib.sha256(f"{kind}|{split}|{owner}|{seed}".encode()).digest()[:16], "big")
    for block in range(0, count, BLOCK):
        rows = np.random.default_rng([key, block]).random((BLOCK, width))
        yield from map(Draw, rows[: count - block].tolist())

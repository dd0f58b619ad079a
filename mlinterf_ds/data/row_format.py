"""How text becomes rows: their length, what is predicted, and which tokens of a row see each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MASK_SHARE = 0.15  # BERT's
Boundaries = Literal["none", "sentence", "document"]
Positions = Literal["row", "boundary"]


@dataclass(frozen=True)
class RowFormat:
    """How text becomes rows of a model's input.

    Tokens see each other within a segment of a row: a sentence, a document (a line that stands alone is one), or the whole
    row (`boundaries="none"`). With `positions="boundary"` a segment's tokens have the positions that they would have in a
    row of their own behind `<s>`, whether the segment stands at the row's beginning or not; with "row" they count from
    the row's beginning.
    """

    length: int  # tokens of a row, `<s>` included
    mask_share: float = MASK_SHARE  # of a row's text is predicted
    boundaries: Boundaries = "document"
    positions: Positions = "boundary"

    @property
    def masked(self) -> int:
        """How many positions of a row are predicted: `round(mask_share * (length - 1))`, at least one."""
        return max(1, round(self.mask_share * (self.length - 1)))

"""The model's regions (embeddings, a layer, head and loss) as `torch.compile` makes them.

A region is a plain function of a module and tensors. Layers of one shape share one compiled function, and so do the
languages of a routed module, whose copies are looked up outside of the regions (`routing.Routed.follow`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from mlinterf_ds.errors import warn

Region = Callable[..., Any]
MOST_LANGUAGES = 8  # languages of a pass up to which regions are compiled, since the code repeats for each of them
MOST_KINDS = (
    64  # compiled forms of a region, which differ by shape, by training or not, and by whose gradients it computes
)


def regions(
    wanted: bool | Literal["auto"], device: torch.device, first: bool = True
) -> Callable[[Region, int], Region] | None:
    """Returns the function that compiles the regions of a model on this device, or None where they run uncompiled.

    wanted: "auto" compiles on accelerators. Where nothing can be compiled, the first rank warns and the run goes on.
    """
    if wanted is False or (wanted == "auto" and device.type == "cpu"):
        return None
    try:
        torch.compile(_probe, dynamic=False)(torch.zeros(2, device=device))
    except Exception as error:  # a compiler fails in many ways: a missing one, an old one, a read-only cache folder
        if first:
            reason = str(error).strip().splitlines()
            warn(
                f"model.compile={str(wanted).lower()}: nothing can be compiled here "
                f"({type(error).__name__}: {reason[0] if reason else ''}); the model runs uncompiled, more slowly"
            )
        return None
    return Compiled()


def _probe(value: torch.Tensor) -> torch.Tensor:
    return value * 2 + 1


class Compiled:
    """Compiles a region when it first runs."""

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        """options: further arguments of `torch.compile`."""
        self.options = dict(options or {})
        torch._dynamo.config.recompile_limit = max(MOST_KINDS, torch._dynamo.config.recompile_limit)
        self.compiled: dict[Region, Region] = {}

    def __call__(self, region: Region, languages: int) -> Region:
        """The function that runs this region in a pass over that many languages."""
        if languages > MOST_LANGUAGES:
            return region
        if region not in self.compiled:
            self.compiled[region] = torch.compile(region, dynamic=False, **self.options)
        return self.compiled[region]

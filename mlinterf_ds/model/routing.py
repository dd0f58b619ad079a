"""Language routing: each row of a batch goes through the module of its own language.

Rows are grouped by language before the first layer and put back in order after the last, so that inside the encoder a
language's rows are one slice of dimension 0 and routing costs no more than joining the slices again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mlinterf_ds.errors import UserError, warn

Region = Callable[..., Any]
# A step's languages in the order in which every rank visits them: (language, first of the grouped rows, row after the last).
Route = tuple[tuple[int, int, int], ...]
MOST_LANGUAGES = 8  # languages of a pass up to which regions are compiled, since the code repeats for each of them
# Compiled forms of a region, which differ by shape, by training or not, and by whose gradients it computes.
MOST_KINDS = 128
MOST_DIVISIONS = (
    4  # divisions of a pass's rows among languages that are compiled: each in up to MOST_LANGUAGES x 2 forms
)


class Router:
    """Sets the route of the forward pass in progress; the routed modules of all layers share one router.

    It also runs the model's regions, uncompiled or compiled (`regions`).
    """

    def __init__(self, languages: Sequence[str]):
        assert len(set(languages)) == len(languages) > 0, f"languages must be distinct: {languages}"
        self.languages = tuple(languages)
        self.route: Route | None = None
        self.members: list[Routed] = []
        self.regions: Callable[[Region, Route], Region] | None = None

    def run(self, region: Region, *arguments: Any) -> Any:
        """Runs a region of the model with these arguments and returns its value."""
        if self.regions is not None:
            region = self.regions(region, self.route if self.route and self.members else ())
        return region(*arguments)

    def plan(self, languages: Tensor, step_languages: Sequence[int]) -> tuple[Route, list[int] | None]:
        """The route of rows with these languages, and the row order that groups them (None if they are grouped already).

        languages: (rows,) indices into `self.languages`; step_languages: the languages of all ranks' rows. Raises
        UserError for an index without a language.
        """
        rows: list[int] = languages.tolist()
        for language in {*rows, *step_languages}:
            self._check(language)
        rank = {language: index for index, language in enumerate(step_languages)}
        assert set(rows) <= set(rank), f"rows in languages {sorted(set(rows))}, the step has {list(step_languages)}"
        order = sorted(range(len(rows)), key=lambda row: rank[rows[row]])  # stable: a language's rows keep their order
        slices, first = [], 0
        for language in step_languages:
            end = first + rows.count(language)
            slices.append((language, first, end))
            first = end
        return tuple(slices), None if order == list(range(len(rows))) else order

    def _check(self, language: int) -> None:
        if not 0 <= language < len(self.languages):
            known = ", ".join(f"{index} = {code}" for index, code in enumerate(self.languages))
            raise UserError(
                f"language {language}: the model has no module for it; expected one of {known}. "
                "Train a model with that language, or leave its rows out."
            )

    @contextlib.contextmanager
    def following(self, route: Route | None) -> Iterator[None]:
        """Routed modules called inside follow this route."""
        outer = self.route
        self._follow(route)
        try:
            yield
        finally:
            self._follow(outer)

    def _follow(self, route: Route | None) -> None:
        self.route = route
        for member in self.members:
            member.follow(route)


class Routed(nn.Module):
    """One copy of a module for each language; every row goes through its language's copy.

    The copies take hidden states (rows, length, width). Every rank visits all of the step's languages in one order, those
    without rows on it too: their gradients are then zero rather than missing, and collectives inside the modules (tensor
    parallel, ZeRO 3's gathers) line up.
    """

    def __init__(self, router: Router, build: Callable[[], nn.Module]):
        super().__init__()
        # the prefix keeps codes such as `to`, `type` or `keys` apart from attributes of torch's modules
        self.copies = nn.ModuleDict({f"language_{code}": build() for code in router.languages})
        self.languages = router.languages
        self.parts: tuple[tuple[nn.Module, int, int], ...] = ()  # the copies that the route visits, with their rows
        router.members.append(self)

    def language(self, code: str) -> nn.Module:
        """The module of one language."""
        return self.copies[f"language_{code}"]

    def follow(self, route: Route | None) -> None:
        """Looks up the copies that the route visits. This happens outside of compiled regions, so that one serves all
        languages."""
        self.parts = tuple(
            (self.language(self.languages[language]), first, end) for language, first, end in route or ()
        )

    def forward(self, hidden: Tensor, **others: Any) -> Tensor:
        """Tensors among `others` have one entry a row along dimension 0, like `hidden`."""
        assert len(self.parts) > 0, "a routed module was called outside Router.following"
        if len(self.parts) == 1:
            return self.parts[0][0](hidden, **others)
        assert self.parts[-1][2] == len(hidden), f"the route has {self.parts[-1][2]} rows, the batch {len(hidden)}"
        outputs = []
        for copy, first, end in self.parts:
            own = {key: value[first:end] if isinstance(value, Tensor) else value for key, value in others.items()}
            outputs.append(copy(hidden[first:end], **own))
        return torch.cat(outputs)


# --- regions ----------------------------------------------------------------------------------------------------------
# A region (embeddings, a layer, head and loss) is a plain function of a module and tensors, which `torch.compile` may take as
# a whole. Layers of one shape share one compiled function, and so do the languages of a routed module, whose copies are
# looked up outside of the regions (`Routed.follow`).


def regions(wanted: bool | Literal["auto"], device: torch.device, first: bool = True) -> Compiled | None:
    """Returns the function that compiles the regions of a model on this device, or None where they run uncompiled.

    wanted: "auto" compiles on accelerators. Where nothing can be compiled, the first rank warns and the run goes on.
    """
    if wanted is False or (wanted == "auto" and device.type == "cpu"):
        return None
    try:
        torch.compile(lambda value: 2 * value + 1, dynamic=False)(torch.zeros(2, device=device))
    except Exception as error:  # a compiler fails in many ways: a missing one, an old one, a read-only cache folder
        if first:
            reason = str(error).strip().splitlines()
            warn(
                f"model.compile={str(wanted).lower()}: nothing can be compiled here "
                f"({type(error).__name__}: {reason[0] if reason else ''}); the model runs uncompiled, more slowly"
            )
        return None
    return Compiled()


class Compiled:
    """Compiles a region when it first runs."""

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        """options: further arguments of `torch.compile`."""
        self.options = dict(options or {})
        torch._dynamo.config.recompile_limit = max(MOST_KINDS, torch._dynamo.config.recompile_limit)
        self.compiled: dict[Region, Region] = {}
        self.several = True  # whether passes over several languages are compiled
        self._divisions: set[tuple[tuple[int, int], ...]] = (
            set()
        )  # of rows among languages, in passes that are compiled

    def __call__(self, region: Region, route: Route) -> Region:
        """The function that runs this region in a pass along this route; () if no module of the model is routed.

        Where the rows of several languages begin and end is compiled into the code, so that each division of rows is compiled anew:
        a few of them are, and rows that are mixed in ever new ways run as they stand.
        """
        if len(route) > 1:
            division = tuple((first, end) for _, first, end in route)
            if division not in self._divisions:
                if not self.several or len(route) > MOST_LANGUAGES or len(self._divisions) >= MOST_DIVISIONS:
                    return region
                self._divisions.add(division)
        if region not in self.compiled:
            self.compiled[region] = torch.compile(region, dynamic=False, **self.options)
        return self.compiled[region]

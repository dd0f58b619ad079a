"""Language routing: each row of a batch goes through the module of its own language.

Rows are grouped by language before the first layer and put back in order after the last, so that inside the encoder a
language's rows are one slice of dimension 0 and routing costs no more than joining the slices again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor, nn

from mlinterf_ds.errors import UserError


@dataclass(frozen=True)
class Route:
    """A step's languages in the order in which every rank visits them, each with its slice of the grouped rows."""

    slices: tuple[tuple[int, int, int], ...]  # (language, first row, row after the last)


class Router:
    """Holds the route of the forward pass in progress; the routed modules of all layers share one router."""

    def __init__(self, languages: Sequence[str]):
        assert len(set(languages)) == len(languages) > 0, f"languages must be distinct: {languages}"
        self.languages = tuple(languages)
        self.route: Route | None = None

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
        return Route(tuple(slices)), None if order == list(range(len(rows))) else order

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
        outer, self.route = self.route, route
        try:
            yield
        finally:
            self.route = outer


class Routed(nn.Module):
    """One copy of a module for each language; every row goes through its language's copy.

    The copies follow megatron's convention: they take hidden states (rows, length, width) and return (output, bias to
    add or None). Every rank visits all of the step's languages in one order, also those without rows on it: they get
    gradients of zero rather than none, and collectives inside them (tensor parallel, ZeRO 3's gathers) line up.
    """

    def __init__(self, router: Router, module: ModuleSpec, **build_with: Any):
        super().__init__()
        self.router = router
        # the prefix keeps codes such as `to`, `type` or `keys` apart from attributes of torch's modules
        self.copies = nn.ModuleDict(
            {f"language_{code}": build_module(module, **build_with) for code in router.languages}
        )

    def language(self, code: str) -> nn.Module:
        """The module of one language."""
        return self.copies[f"language_{code}"]

    def forward(self, hidden: Tensor, **others: Any) -> tuple[Tensor, Tensor | None]:
        """Tensors among `others` have one entry a row along dimension 0, like `hidden`."""
        route = self.router.route
        assert route is not None, "a routed module was called outside Router.following"
        copies = [self.language(self.router.languages[language]) for language, _, _ in route.slices]
        if len(copies) == 1:
            return copies[0](hidden, **others)
        assert route.slices[-1][2] == len(hidden), f"route {route.slices} for {len(hidden)} rows"
        outputs = []
        for copy, (_, first, end) in zip(copies, route.slices, strict=True):
            own = {key: value[first:end] if isinstance(value, Tensor) else value for key, value in others.items()}
            output, bias = copy(hidden[first:end], **own)
            outputs.append(output if bias is None else output + bias)
        return torch.cat(outputs), None


def routed(router: Router, module: ModuleSpec) -> ModuleSpec:
    """The spec of `module`, one copy for each of the router's languages."""
    return ModuleSpec(module=Routed, params={"router": router, "module": module})

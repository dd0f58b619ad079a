"""The models of a study: every combination of languages, variant, seed and control, none twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mlinterf_ds.pretrain.config import load_run
from mlinterf_ds.sections import architecture, is_meta
from mlinterf_ds.study.config import SetSection, StudyConfig


@dataclass(frozen=True)
class Model:
    """One pretrained model of the grid."""

    set: str  # the set's name; for a monolingual model its language, as LANG@N if only N sentences are kept
    kind: str  # the set's kind, or "mono"
    languages: tuple[str, ...]
    variant: str
    seed: int
    settings: tuple[str, ...] = ()
    limits: tuple[tuple[str, int], ...] = ()  # (language, training sentences kept)
    control: str = ""  # "direct" or "compute" (see ControlsSection)

    @property
    def name(self) -> str:
        return f"{self.variant}{'-' + self.control if self.control else ''}.{self.set}.seed{self.seed}"

    @property
    def facts(self) -> dict[str, Any]:
        """The model's columns in the records."""
        names = ("set", "kind", "variant", "seed", "control")
        return {name: getattr(self, name) for name in names} | {"languages": list(self.languages)}


def models(config: StudyConfig) -> list[Model]:
    """Every model of the grid. Sets share their monolingual models, so names decide which models are the same."""
    grid: dict[str, Model] = {}
    for seed in config.seeds:
        for group in config.sets:
            for model in [*_monolingual(config, group, seed), *_multilingual(config, group, seed)]:
                grid.setdefault(model.name, model)
    return list(grid.values())


def _monolingual(config: StudyConfig, group: SetSection, seed: int) -> Iterator[Model]:
    """A model of each language of a pair, with as much text as the pair's models have of it."""
    if config.mono and group.kind in ("pair", "low"):
        for language in group.languages:
            limit = group.limits.get(language)
            limits = ((language, limit),) if limit else ()
            yield Model(f"{language}@{limit}" if limit else language, "mono", (language,), "mono", seed, (), limits)


def _multilingual(config: StudyConfig, group: SetSection, seed: int) -> Iterator[Model]:
    """A model of each variant of a set, and the controls of the meta variants of a pair."""
    limits, settings = tuple(sorted(group.limits.items())), tuple(group.settings)
    common = (group.name, group.kind, tuple(group.languages))
    for variant in config.variants_of(group):
        yield Model(*common, variant, seed, settings, limits)
        if is_meta(variant) and group.kind == "pair":
            if config.controls.direct:
                yield Model(*common, variant, seed, (*settings, "meta.terms=direct"), limits, "direct")
            if config.controls.compute:
                steps = load_run([*config.recipes], [*config.settings, *settings]).train.steps
                longer = (*settings, f"train.steps={round(steps * config.controls.compute)}")
                yield Model(*common, architecture(variant), seed, longer, limits, "compute")

"""The models of a study: every combination of languages, variant, seed and control, each once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlinterf_ds.pretrain.config import load_run
from mlinterf_ds.study.config import SetSection, StudyConfig


@dataclass(frozen=True)
class Model:
    """One pretrained model of the grid."""

    set: str  # the set's name; of a monolingual model its language, with @N where that has only N sentences
    kind: str  # the set's; or "mono"
    languages: tuple[str, ...]
    variant: str
    seed: int
    settings: tuple[str, ...] = ()
    limits: tuple[tuple[str, int], ...] = ()
    control: str = ""  # "direct" or "compute"

    @property
    def name(self) -> str:
        return f"{self.variant}{'-' + self.control if self.control else ''}.{self.set}.seed{self.seed}"

    @property
    def facts(self) -> dict[str, Any]:
        """What a record says of the model."""
        names = ("set", "kind", "variant", "seed", "control")
        return {name: getattr(self, name) for name in names} | {"languages": list(self.languages)}


def models(config: StudyConfig) -> list[Model]:
    """Every model of the grid once: monolingual ones are shared by the sets that need them."""
    found: dict[tuple[Any, ...], Model] = {}

    def add(model: Model) -> None:
        found.setdefault((model.name,), model)

    for seed in config.seeds:
        for group in config.sets:
            limits = tuple(sorted(group.limits.items()))
            if config.mono and group.kind in ("pair", "low"):
                for language in group.languages:
                    add(_mono(language, group, seed))
            common = (group.name, group.kind, tuple(group.languages))
            for variant in config.variants_of(group):
                settings = tuple(group.settings)
                add(Model(*common, variant, seed, settings, limits))
                if variant.startswith("meta_") and group.kind == "pair":
                    if config.controls.direct:
                        add(Model(*common, variant, seed, (*settings, "meta.terms=direct"), limits, "direct"))
                    if config.controls.compute:
                        steps = _steps(config, settings) * config.controls.compute
                        more = (*settings, f"train.steps={round(steps)}")
                        add(Model(*common, variant.removeprefix("meta_"), seed, more, limits, "compute"))
    return list(found.values())


def _mono(language: str, group: SetSection, seed: int) -> Model:
    kept = group.limits.get(language)
    limits = ((language, kept),) if kept else ()
    return Model(f"{language}@{kept}" if kept else language, "mono", (language,), "mono", seed, (), limits)


def _steps(config: StudyConfig, settings: Sequence[str]) -> int:
    return load_run([*config.recipes], [*config.settings, *settings]).train.steps

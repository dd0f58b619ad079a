"""Pipelines of `transformers` that take a language. Exported folders hold a copy of this file.

fill = transformers.pipeline("fill-mask", FOLDER, trust_remote_code=True)
fill("Habari ya <mask>", language="sw")
"""

from __future__ import annotations

from typing import Any

from transformers import FeatureExtractionPipeline, FillMaskPipeline


class _WithLanguage:
    """Passes `language`, a code for all texts of a call, on to the model."""

    def _sanitize_parameters(self, language: str | None = None, **others: Any) -> tuple[dict, dict, dict]:
        before, forward, after = super()._sanitize_parameters(**others)  # type: ignore[misc]
        return before, forward | ({"language": language} if language else {}), after

    def _forward(self, model_inputs: dict[str, Any], language: str | None = None) -> Any:
        return super()._forward({**model_inputs, "language": language})  # type: ignore[misc]


class FillMask(_WithLanguage, FillMaskPipeline):
    """The task `fill-mask`."""


class FeatureExtraction(_WithLanguage, FeatureExtractionPipeline):
    """The task `feature-extraction`: hidden states of the encoder's last layer."""

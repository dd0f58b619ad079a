"""An exported folder as a model of MLflow's `pyfunc` flavour: sentences with `<mask>` in, the likeliest words out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MASK = "<mask>"


def _load_pyfunc(path: str) -> FillMask:
    """MLflow's hook: the model of the folder that was logged."""
    return FillMask(Path(path))


class FillMask:
    """Fills every `<mask>` of a text with its likeliest piece, by the language's own modules."""

    def __init__(self, folder: Path):
        from transformers import AutoModelForMaskedLM, AutoTokenizer

        # routed models bring their class along, a file of the same folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        self.model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()

    def predict(self, frame: Any, params: dict[str, Any] | None = None) -> list[str]:
        """frame: columns text and, for models with modules of each language, language. The texts, filled."""
        import torch

        found = []
        for row in frame.to_dict("records"):
            tokens = self.tokenizer(row["text"], return_tensors="pt")
            routed = {"language": row["language"]} if hasattr(self.model.config, "languages") else {}
            with torch.no_grad():
                best = self.model(**tokens, **routed).logits[0].argmax(-1)
            ids = tokens["input_ids"][0]
            ids = torch.where(ids == self.tokenizer.mask_token_id, best, ids)
            found.append(self.tokenizer.decode(ids, skip_special_tokens=True))
        return found

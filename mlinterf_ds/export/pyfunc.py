"""An exported folder as a model of MLflow's `pyfunc` flavour, which fills every `<mask>` in sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MASK = "<mask>"


def _load_pyfunc(path: str) -> FillMask:
    """Loads the model of the folder that was logged; MLflow calls it."""
    return FillMask(Path(path))


class FillMask:
    """Fills every `<mask>` of a text with its most likely piece, through the modules of the text's language."""

    def __init__(self, folder: Path):
        from transformers import AutoModelForMaskedLM, AutoTokenizer

        # The class of a model with language-specific modules is a file of the folder.
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        self.model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()

    def predict(self, frame: Any, params: dict[str, Any] | None = None) -> list[str]:
        """The filled texts; frame: column `text` and, for models with language-specific modules, column `language`."""
        import torch

        filled = []
        for row in frame.to_dict("records"):
            tokens = self.tokenizer(row["text"], return_tensors="pt")
            routed = {"language": row["language"]} if hasattr(self.model.config, "languages") else {}
            with torch.no_grad():
                best = self.model(**tokens, **routed).logits[0].argmax(-1)
            ids = tokens["input_ids"][0]
            ids = torch.where(ids == self.tokenizer.mask_token_id, best, ids)
            filled.append(self.tokenizer.decode(ids, skip_special_tokens=True))
        return filled

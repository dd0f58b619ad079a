"""Classes of `transformers` with the same graph as this encoder: translates configurations and parameters both ways.

One table names the parameters. A parameter of ours is one of theirs, except that our joint projection holds each head's
query, key and value side by side where they have three projections. ("Ours" is this package's, "theirs" the class's.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlinterf_ds.errors import UserError
from mlinterf_ds.sections import ModelConfig, has_adapters

OURS = "mlinterf"  # the model type of our own class, whose parameters have our names
PROJECTIONS = ("query", "key", "value")
LANGUAGE = r"copies\.language_([^.]+)\."  # in the name of a routed module's parameter


@dataclass(frozen=True)
class Stock:
    """A model class of `transformers`, described by the names in which it differs from XLM-RoBERTa's."""

    architecture: str  # its class with the head that predicts masked tokens
    base: str = "roberta"
    norms: tuple[str, str] = ("attention.output.LayerNorm", "output.LayerNorm")
    head: tuple[str, str, str] = ("lm_head", "lm_head.dense", "lm_head.layer_norm")
    after_padding: bool = True  # the first position of a row is the one after the padding token's id, not 0


STOCK = {
    "xlm-roberta": Stock("XLMRobertaForMaskedLM"),
    "roberta": Stock("RobertaForMaskedLM"),
    "camembert": Stock("CamembertForMaskedLM"),
    "xlm-roberta-xl": Stock("XLMRobertaXLForMaskedLM", norms=("attention.self_attn_layer_norm", "LayerNorm")),
    "xmod": Stock("XmodForMaskedLM"),
    "bert": Stock(
        "BertForMaskedLM",
        base="bert",
        head=("cls.predictions", "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
        after_padding=False,
    ),
}
PRE_NORM = ("input_layernorm", "pre_mlp_layernorm")
POST_NORM = ("post_attention_layernorm", "post_mlp_layernorm")
# The classes' own defaults of keys that a config.json may leave out.
DEFAULTS = {
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "pre_norm": False,
    "adapter_reduction_factor": 2,
    "adapter_layer_norm": False,
    "adapter_reuse_layer_norm": True,
    "ln_before_adapter": True,
}
# Settings that do not show in the weights, and the only value of each that this encoder can have.
FIXED = {
    "hidden_act": "gelu",
    "tie_word_embeddings": True,
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}
# Keys of `model` that have the same names in the config.json of our own class.
OF_ADAPTERS = ("adapter_after", "adapter_on", "adapter_norm", "adapter_skip")
OWN_KEYS = ("norm", "embedding_norm", "position_kind", "position_offset", "token_types", *OF_ADAPTERS)
SPECIAL_IDS = ("bos_token_id", "pad_token_id", "eos_token_id")


class Names:
    """The names of this encoder's parameters in a model class of `transformers`.

    languages: for each of our language codes with modules of its own, the class's name of the language.
    """

    def __init__(self, model_type: str, languages: Mapping[str, str] | None = None):
        stock, self.languages = STOCK[model_type], dict(languages or {})
        self.modules = {
            "embeddings.word": "embeddings.word_embeddings",
            "embeddings.position": "embeddings.position_embeddings",
            "embeddings.token_type": "embeddings.token_type_embeddings",
            "embeddings.norm": "embeddings.LayerNorm",
            "block.final_layernorm": "encoder.LayerNorm",
        }
        self.modules = {ours: f"{stock.base}.{theirs}" for ours, theirs in self.modules.items()}
        self.modules |= dict(zip(("head", "head.dense", "head.norm"), stock.head, strict=True))
        self.layer = f"{stock.base}.encoder.layer"
        self.in_layer = {
            "self_attention.linear_qkv": "attention.self.query",  # and key and value
            "self_attention.linear_proj": "attention.output.dense",
            "mlp.linear_fc1": "intermediate.dense",
            "mlp.linear_fc2": "output.dense",
            "mlp_bda.adapter_norm": "output.adapter_layer_norm",
            **dict(zip(PRE_NORM, stock.norms, strict=True)),
            **dict(zip(POST_NORM, stock.norms, strict=True)),
        }
        for ours, theirs in self.languages.items():
            for part, name in (("down", "dense1"), ("up", "dense2")):
                self.in_layer[f"mlp_bda.adapter.copies.language_{ours}.{part}"] = (
                    f"output.adapter_modules.{theirs}.{name}"
                )

    def theirs(self, name: str) -> tuple[str, ...]:
        """The class's names for our parameter: one, three for the joint projection, or none if it has no such parameter."""
        module, _, kind = name.rpartition(".")
        if match := re.fullmatch(r"block\.layers\.(\d+)\.(.+)", module):
            part = self.in_layer.get(match[2])
            if part is None:
                return ()
            parts = [part.replace("query", which) for which in PROJECTIONS] if "query" in part else [part]
            return tuple(f"{self.layer}.{match[1]}.{part}.{kind}" for part in parts)
        return (f"{self.modules[module]}.{kind}",) if module in self.modules else ()

    def converted(self, weights: Mapping[str, Tensor], heads: int) -> dict[str, Tensor]:
        """Translates all of our parameters to those of the class, by its names."""
        converted: dict[str, Tensor] = {}
        for name, weight in weights.items():
            theirs = self.theirs(name)
            assert theirs, f"{name} is no part of this class"
            parts = [weight] if len(theirs) == 1 else weight.unflatten(0, (heads, 3, -1)).unbind(1)
            for part, where in zip(parts, theirs, strict=True):
                converted[where] = (part if len(theirs) == 1 else part.flatten(0, 1)).contiguous()
        return converted


def joined(parts: Sequence[Tensor], heads: int) -> Tensor:
    """Our joint projection from three: query, key and value projections, each (heads * head width, ...)."""
    return torch.stack([part.unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 2)


# -- configuration ---------------------------------------------------------------------------------------------------


def check(config: Mapping[str, Any], where: str) -> None:
    """Raises UserError if the model of a config.json is of an unknown class, or has another graph than this encoder.

    where: the file, for the message.
    """
    kind = config["model_type"]
    if kind != OURS and kind not in STOCK:
        known = ", ".join((OURS, *STOCK))
        raise UserError(
            f"{where}: a model of type {kind!r}; this encoder can only be a model of type {known}: take one of these"
        )
    for key, expected in FIXED.items():
        if (value := config.get(key, expected)) != expected:
            raise UserError(f"{where}: {key} is {value!r}, but this encoder needs {expected!r}: take a model with that")


def model_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `model` (`ModelConfig`) that describe the model of a config.json; those of adapters only if it has any."""
    kind = config["model_type"]
    values: dict[str, Any] = DEFAULTS | {key: value for key, value in config.items() if value is not None}
    keys: dict[str, Any] = {
        "layers": int(values["num_hidden_layers"]),
        "heads": int(values["num_attention_heads"]),
        "width": int(values["hidden_size"]),
        "ffn": int(values["intermediate_size"]),
        "dropout": float(values["hidden_dropout_prob"]),
        "attention_dropout": float(values["attention_probs_dropout_prob"]),
        "epsilon": float(values["layer_norm_eps"]),
        "position_kind": "learned",  # in stock classes, and in exports of before
        "positions": int(values["max_position_embeddings"]),
    }
    if kind == OURS:
        same = [key for key in (*OWN_KEYS, "language_embeddings") if not key.startswith("adapter")]
        keys |= {key: values[key] for key in same if key in values}  # older exports lack some: the defaults
        keys |= {"head_width": int(values["head_dim"])} if "head_dim" in values else {}
        if has_adapters(str(values.get("variant"))):
            keys |= {"adapter": int(values["adapter_size"]), "adapter_activation": values["adapter_activation"]}
            keys |= {key: values[key] for key in OWN_KEYS if key in values and key.startswith("adapter")}
        return keys
    keys |= {
        "norm": "pre" if kind == "xlm-roberta-xl" or values["pre_norm"] else "post",
        "embedding_norm": kind != "xlm-roberta-xl",
        "token_types": int(values["type_vocab_size"]),
        "position_offset": first_position(kind, values),
    }
    if kind == "xmod":
        norm = "own" if values["adapter_layer_norm"] else "layer" if values["adapter_reuse_layer_norm"] else "none"
        keys |= {
            "adapter": int(keys["width"] // values["adapter_reduction_factor"]),
            "adapter_activation": "gelu",
            "adapter_after": "ffn",
            "adapter_on": "sum",
            "adapter_norm": norm,
            "adapter_skip": "normed" if values["ln_before_adapter"] and norm != "none" else "sum",
        }
    return keys


def first_position(kind: str, config: Mapping[str, Any]) -> int:
    """The row of a stock class's position table that belongs to a text's first token."""
    return int(config.get("pad_token_id", 1)) + 1 if STOCK[kind].after_padding else 0


def stock_type(shape: ModelConfig, variant: str) -> str | None:
    """The model type of `transformers` that has this model's graph; None if only our own class has."""
    if shape.heads * shape.kv_channels != shape.width or shape.language_embeddings or shape.position_kind == "rotary":
        return None
    if variant in ("mono", "joint"):
        kinds = {("post", True): "xlm-roberta", ("pre", False): "xlm-roberta-xl"}
        return kinds.get((shape.norm, shape.embedding_norm))
    divides = shape.adapter_width == shape.width // max(1, shape.width // shape.adapter_width)
    placed = (shape.adapter_after, shape.adapter_on, shape.adapter_activation) == ("ffn", "sum", "gelu")
    return "xmod" if variant == "adpt" and shape.embedding_norm and placed and divides else None


def stock_config(kind: str, shape: ModelConfig, positions: int) -> dict[str, Any]:
    """The keys of config.json that are particular to this model type; positions: rows of its position table."""
    config = {
        "model_type": kind,
        "architectures": [STOCK[kind].architecture],
        "hidden_act": "gelu",
        "max_position_embeddings": positions,
        "type_vocab_size": shape.token_types or 1,
    }
    if kind == "xmod":
        config |= {
            "pre_norm": shape.norm == "pre",
            "adapter_reduction_factor": shape.width // shape.adapter_width,
            "adapter_layer_norm": shape.adapter_norm == "own",
            "adapter_reuse_layer_norm": shape.adapter_norm == "layer",
            "ln_before_adapter": shape.adapter_skip == "normed",
        }
    return config


def with_first_rows(weights: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    """Our parameters, completed for a stock class: `rows` rows of zeros before the first position, and a token type."""
    complete, position = dict(weights), weights["embeddings.position.weight"]
    complete["embeddings.position.weight"] = torch.cat([position.new_zeros(rows, position.shape[1]), position])
    complete.setdefault("embeddings.token_type.weight", position.new_zeros(1, position.shape[1]))
    return complete


# -- languages -------------------------------------------------------------------------------------------------------


def language_of(code: str, names: Sequence[str], where: object) -> str | None:
    """The language of X-MOD (en_XX, zh_CN) that a code of ours (en, zh_cn) stands for; None if there is none.

    Raises UserError if the code fits several.
    """
    for name in names:
        if name.lower() == code:
            return name
    fitting = [name for name in names if re.split("[_-]", name.lower())[0] == code]
    if len(fitting) > 1:
        raise UserError(f"{where}: {code} fits {' and '.join(fitting)}: call it {' or '.join(map(str.lower, fitting))}")
    return fitting[0] if fitting else None

"""The vocabulary of another model, read from its `transformers` folder: every piece keeps the id that the model gives it.

A `tokenizer.json` is kept as it is and read by the library `tokenizers`; the corpus's file wraps it and says which pieces are
special (`mlinterf_ds.data.tokenizer.Library`). Where a folder has only a SentencePiece model, the ids in it are not those of
the embeddings, which are in fairseq's order (its own special pieces come first). It is converted, as transformers does, to
a tokenizer of the library with every piece at its id.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto

from mlinterf_ds.data.tokenizer import SPECIAL_PIECES
from mlinterf_ds.errors import UserError, refusing

OWN = "sentencepiece.model"  # in a folder that this package exported; its ids are the model's
FAIRSEQ = "sentencepiece.bpe.model"  # in XLM-R's and CamemBERT's folders, although their models are unigram ones
LIBRARY = "tokenizer.json"
# The pieces that fairseq's order puts first, and the number of the SentencePiece model's first pieces that they replace.
ORDERS: dict[str, tuple[list[str], int]] = {
    "xlm-roberta": (["<s>", "<pad>", "</s>", "<unk>"], 3),
    "camembert": (["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED"], 1),
}
KIN = {"xlm-roberta": "xlm-roberta", "xlm-roberta-xl": "xlm-roberta", "xmod": "xlm-roberta", "camembert": "camembert"}
# For each special piece of ours, its names in a tokenizer's configuration, by preference.
ROLES: dict[str, tuple[str, ...]] = {"bos": ("cls_token", "bos_token"), "eos": ("sep_token", "eos_token")}
ROLES |= {"pad": ("pad_token",), "unk": ("unk_token",), "mask": ("mask_token",)}


def vocabulary_file(path: Path) -> bytes:
    """The content that a corpus's tokenizer file has for this path: a tokenizer file, or the folder of a model or of a corpus.

    Raises UserError, which names the file, if one is missing or cannot be used.
    """
    if not path.is_dir():
        try:
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: the tokenizer cannot be read: {error.strerror}") from None
    for name in ("tokenizer.model", OWN):  # of a corpus or a checkpoint, and of an exported folder
        if (path / name).is_file():
            return (path / name).read_bytes()
    if (path / LIBRARY).is_file():
        return _library(path)
    if (path / FAIRSEQ).is_file():
        return _converted(path / FAIRSEQ, _order(path))
    raise UserError(
        f"{path}: has neither {LIBRARY} nor {FAIRSEQ}: save the model's tokenizer there with save_pretrained"
    )


def is_folder(path: Path) -> bool:
    """Whether a path is a model's `transformers` folder."""
    return any((path / name).is_file() for name in (OWN, LIBRARY, FAIRSEQ))


def _order(path: Path) -> str:
    """The order of ids that the model of a folder has: a key of ORDERS."""
    with refusing(f"{path / 'config.json'}: not a model's configuration"):
        kind = json.loads((path / "config.json").read_bytes())["model_type"]
    if kind not in KIN:
        raise UserError(
            f"{path}: the ids of a {FAIRSEQ} are known for models of type {', '.join(KIN)}, not {kind}: save its {LIBRARY} "
            "there with transformers' AutoTokenizer.from_pretrained(...).save_pretrained"
        )
    return KIN[kind]


def _converted(file: Path, order: str) -> bytes:
    """A SentencePiece model in fairseq's order as JSON: a tokenizer of the library, and the ids of its special pieces."""
    with refusing(f"{file}: not a SentencePiece model, or damaged"):
        try:
            model = ModelProto.FromString(file.read_bytes())
        except Exception as error:  # protobuf's own class depends on its version
            raise ValueError(str(error)) from None
    if [piece.piece for piece in model.pieces[:3]] != ["<unk>", "<s>", "</s>"]:
        raise UserError(f"{file}: its first pieces are not <unk> <s> </s>, as fairseq's order needs them")
    if model.trainer_spec.model_type != model.trainer_spec.UNIGRAM or model.trainer_spec.byte_fallback:
        raise UserError(f"{file}: expected a unigram model without byte pieces, as fairseq's models have")
    first, replaced = ORDERS[order]
    pieces = [(piece, 0.0) for piece in first] + [(piece.piece, piece.score) for piece in model.pieces[replaced:]]
    pieces.append((SPECIAL_PIECES[-1], 0.0))
    ids = {piece: number for number, (piece, _) in enumerate(pieces)}
    bos, pad, eos, unk, mask = (ids[piece] for piece in SPECIAL_PIECES)
    others = sorted({ids[piece] for piece in first} - {bos, pad, eos, unk, mask})
    facts = {"bos": bos, "pad": pad, "eos": eos, "unk": unk, "mask": mask, "others": others, "doubled": True}
    special = sorted({bos, pad, eos, unk, mask, *others})
    content = json.loads(_unigram(pieces, special, facts, model.normalizer_spec.precompiled_charsmap).to_str())
    return json.dumps({"vocabulary": facts, "tokenizer": content}, ensure_ascii=False).encode()


def _unigram(pieces: list[tuple[str, float]], special: list[int], facts: dict[str, Any], charsmap: bytes) -> Any:
    """The library's tokenizer with these pieces and log probabilities; charsmap: SentencePiece's normalisation."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    backend = Tokenizer(models.Unigram(pieces, facts["unk"]))
    if charsmap:
        backend.normalizer = normalizers.Precompiled(charsmap)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.add_special_tokens([AddedToken(pieces[i][0], special=True, normalized=False) for i in special])
    bos, eos = SPECIAL_PIECES[0], SPECIAL_PIECES[2]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}",
        pair=f"{bos} $A {eos} {eos} $B {eos}",
        special_tokens=[(bos, facts["bos"]), (eos, facts["eos"])],
    )
    return backend


def _library(path: Path) -> bytes:
    """A tokenizer.json with the ids of its special pieces beside it, as JSON."""
    with refusing(f"{path / LIBRARY}: not a tokenizer"):
        content = json.loads((path / LIBRARY).read_bytes())
        ids = piece_ids(content)
        marked = [added["id"] for added in content["added_tokens"] if added["special"]]
    named = _named_pieces(path)
    roles = {}
    for role, names in ROLES.items():
        piece = next((named[name] for name in names if name in named), None)
        if piece not in ids:
            raise UserError(
                f"{path}: its tokenizer has no {names[0]} ({piece!r}), which a masked language model needs; save the tokenizer "
                "there with save_pretrained"
            )
        roles[role] = ids[piece]
    others = sorted({*marked, *(ids[piece] for piece in named.values() if piece in ids)} - {*roles.values()})
    vocabulary_facts = {**roles, "others": others, "doubled": _doubled(content, roles["eos"], ids)}
    return json.dumps({"vocabulary": vocabulary_facts, "tokenizer": content}, ensure_ascii=False).encode()


def piece_ids(content: dict[str, Any]) -> dict[str, int]:
    """The id of each piece of a tokenizer.json, those of added tokens included."""
    vocabulary = content["model"]["vocab"]
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {piece: i for i, (piece, _) in enumerate(vocabulary)}
    return ids | {added["content"]: added["id"] for added in content["added_tokens"]}


def _named_pieces(path: Path) -> dict[str, str]:
    """The special pieces by their names (`cls_token`), as tokenizer_config.json and special_tokens_map.json give them."""
    named: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path / name).is_file():
            with refusing(f"{path / name}: not a tokenizer's configuration"):
                settings: dict[str, Any] = json.loads((path / name).read_bytes())
                pairs = {k: v for k, v in settings.items() if k.endswith("_token") and isinstance(v, str | dict)}
                named |= {key: value["content"] if isinstance(value, dict) else value for key, value in pairs.items()}
    return named


def _doubled(content: dict[str, Any], eos: int, ids: dict[str, int]) -> bool:
    """Whether the tokenizer puts two `eos` between the texts of a pair."""
    processor = content.get("post_processor") or {}
    steps = processor.get("processors") or [processor]
    for step in steps:
        if step["type"] == "RobertaProcessing":
            return True
        if step["type"] == "TemplateProcessing":
            pair = [next(iter(part.items())) for part in step["pair"]]
            special = [kind == "SpecialToken" and ids.get(facts["id"]) == eos for kind, facts in pair]
            return any(a and b for a, b in itertools.pairwise(special))
    return False

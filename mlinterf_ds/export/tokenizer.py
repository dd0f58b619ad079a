"""Writes a vocabulary as a file of the library `tokenizers` that gives every text the same ids, special pieces apart.

The exported tokenizer reads `<s>`, `<pad>`, `</s>`, `<unk>` and `<mask>` in a text as the special pieces, as every tokenizer
of `transformers` does; `mlinterf_ds.data.tokenizer` reads them as plain text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlinterf_ds.data.tokenizer import BOS, EOS, INVISIBLE, SPACE_PIECE, SPECIAL_PIECES, UNK, Tokenizer
from mlinterf_ds.errors import UserError

# The whitespace characters at which `str.split`, and so `mlinterf_ds.data.tokenizer.normalise`, splits; the piece for a space.
SPACES = "\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000" + SPACE_PIECE


def write(tokenizer: Tokenizer, folder: Path, positions: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json; positions: length of the longest row, special pieces included.

    Another model's tokenizer.json is written as it came.
    """
    if not tokenizer.foreign:
        _backend(tokenizer).save(str(folder / "tokenizer.json"))
    else:
        content = json.loads(tokenizer.content)["tokenizer"]
        (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8")
    special = tokenizer.vocabulary
    bos, pad, eos, unk, mask = (
        tokenizer.pieces[i] for i in (special.bos, special.pad, special.eos, special.unk, special.mask)
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": positions,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **{"bos_token": bos, "cls_token": bos, "pad_token": pad, "eos_token": eos, "sep_token": eos},
        **{"unk_token": unk, "mask_token": mask},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", "utf-8")


def _backend(tokenizer: Tokenizer) -> Any:
    try:
        from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
        from tokenizers import Tokenizer as Backend
    except ImportError:
        raise UserError("exporting needs the package tokenizers: pip install 'mlinterf_ds[hf]'") from None
    _check(tokenizer)
    numbers = {piece: number for number, piece in enumerate(tokenizer.pieces)}
    backend = Backend(models.BPE(numbers, _merges(tokenizer), unk_token=SPECIAL_PIECES[UNK], fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [
            # Metaspace tells the beginning of a text by its first character, which must not be removed.
            normalizers.Replace(Regex(_escaped(rf"\A[{INVISIBLE.pattern[1:-1]}{SPACES}]+")), " "),
            normalizers.Replace(Regex(_escaped(INVISIBLE.pattern)), ""),
            normalizers.NFC(),
            normalizers.Replace(Regex(_escaped(f"[{SPACES}]+")), " "),
            normalizers.Strip(left=False),  # a space behind a mask begins a word
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in SPECIAL_PIECES])
    bos, eos = SPECIAL_PIECES[BOS], SPECIAL_PIECES[EOS]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", pair=f"{bos} $A {eos} $B {eos}", special_tokens=[(bos, BOS), (eos, EOS)]
    )
    return backend


def _check(tokenizer: Tokenizer) -> None:
    """Refuses models that preparing a corpus does not make: another algorithm or normalisation would give other ids."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto.FromString(tokenizer.content)
    kind, rule = model.trainer_spec.model_type, model.normalizer_spec.name
    if kind != model.trainer_spec.BPE or rule != "identity" or model.trainer_spec.byte_fallback:
        name = type(model.trainer_spec).ModelType.Name(kind)
        raise UserError(
            f"{tokenizer.path}: a SentencePiece model of type {name} with normalisation {rule!r}; only what "
            "tools/prepare_corpus.py learns (BPE, identity) can be exported"
        )


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """The merges in the order of SentencePiece, which joins the neighbours whose joint piece has the lowest id."""
    learned = tokenizer.pieces[len(SPECIAL_PIECES) :]
    known = set(learned)
    return [
        (piece[:cut], piece[cut:])
        for piece in learned
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]


def _escaped(pattern: str) -> str:
    """A character class as the regular expressions of `tokenizers` write it, without lone surrogates, which no text has."""
    pattern = pattern.replace("\ud800-\udfff", "")
    return "".join(c if c.isascii() and c.isprintable() and c != " " else f"\\x{{{ord(c):x}}}" for c in pattern)

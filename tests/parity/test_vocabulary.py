"""The vocabulary of 49 languages against SentencePiece's own, learned from the same sentences as they are."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from mlinterf_ds.data.prepare.vocabulary import _characters, sampled_units, trained
from mlinterf_ds.data.tokenizer import UNK, normalise


@pytest.mark.parametrize("size, unknown", [(4000, 0.02), (8000, 0.0005), (32_000, 0.0005)])
def test_every_language_is_cut_as_finely_as_sentencepiece_cuts_it(shared_data: Path, size: int, unknown: float) -> None:
    """Within 5% for each language on unseen sentences; `unknown` bounds the share of characters that no piece covers."""
    paths = sorted((shared_data / "text").glob("*.txt"))
    if not paths:
        pytest.skip("no texts")
    texts = {
        path.stem: [line for line in map(normalise, path.read_text("utf-8").split("\n")[:600]) if line]
        for path in paths
    }
    seen = {code: lines[:-150] for code, lines in texts.items()}
    shares = np.sqrt([len(lines) for lines in seen.values()])
    shares /= shares.sum()
    weights = shares / [len(lines) for lines in seen.values()]
    weights /= weights.min()
    counts = [Counter(word for line in lines for word in line.split()) for lines in seen.values()]
    ours = sentencepiece.SentencePieceProcessor(
        model_proto=trained(sampled_units(counts, shares, weights, size), size).SerializeToString()
    )
    # The same characters are rare for both.
    rare = dict.fromkeys(map(ord, _characters(counts, size)[1]), "\u2047")
    plain = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(
            f"{line.translate(rare)}\t{round(100 * weight)}"
            for lines, weight in zip(seen.values(), weights, strict=True)
            for line in lines
        ),
        character_coverage=1.0,
        input_format="tsv",
        model_writer=plain,
        model_type="bpe",
        vocab_size=size,
        max_sentence_length=1 << 17,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
        **{"bos_id": 0, "pad_id": 1, "eos_id": 2, "unk_id": 3, "control_symbols": ["<mask>"]},
    )
    theirs = sentencepiece.SentencePieceProcessor(model_proto=plain.getvalue())
    for code, lines in texts.items():
        pieces, expected = (
            [piece for line in lines[-150:] for piece in model.encode(line)] for model in (ours, theirs)
        )
        assert len(pieces) < 1.05 * len(expected), code
        characters = Counter("".join(seen[code]).replace(" ", ""))
        lacking = sum(count for character, count in characters.items() if ours.piece_to_id(character) == UNK)
        assert lacking <= unknown * characters.total(), code

"""The vocabulary that a corpus's languages share: learned on their training splits, or extending another corpus's."""

from __future__ import annotations

import io
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from mlinterf_ds.data.prepare.blocks import BlockTask, count_words
from mlinterf_ds.data.prepare.cleaning import hashes
from mlinterf_ds.data.prepare.extension import appended
from mlinterf_ds.data.prepare.stages import Language, bar
from mlinterf_ds.data.prepare.workers import Workers
from mlinterf_ds.data.tokenizer import BOS, EOS, PAD, SPACE_PIECE, SPECIAL_PIECES, UNK, Tokenizer
from mlinterf_ds.errors import UserError
from mlinterf_ds.files import write_bytes

# A vocabulary is learned from this many characters of distinct units for each piece, and from SAMPLE_RATIO times as many
# characters of running text; from up to UNREPEATED times as many where units hardly repeat (no spaces). SentencePiece needs
# about 65 bytes a character, so that 32,000 pieces are learned in 200 MB.
CHARACTERS_PER_PIECE, FEWEST_CHARACTERS = 75, 500_000
SAMPLE_RATIO, UNREPEATED = 20, 4
# share of each language's text whose characters are in the vocabulary -> the part of all pieces that these may take. The
# first share that fits is used. (XLM-R covers 0.9995 of all text.)
# Below TOGETHER, the commonest characters of all languages together are added up to that share: of a hundred more, a large
# alphabet has little and the small ones have much.
COVERAGE = {0.99995: 0.25} | dict.fromkeys((0.9995, 0.999, 0.998, 0.995, 0.99, 0.98, 0.95), 0.75)
TOGETHER = 0.998
LONGEST_UNIT = 32  # characters: longer runs without a space, such as sentences of Thai, are cut; a piece has 16 at most


def learn(
    languages: list[Language],
    size: int,
    temperature: float,
    out: Path,
    workers: Workers,
    show: bool,
    extends: Tokenizer | None = None,
) -> Tokenizer:
    """Learns the shared vocabulary on the training splits; if it `extends` another vocabulary, learns only the pieces that are
    missing there.

    A language weighs as much as its share of all sentences to the power 1 / temperature, normalised. Of a large language
    only a part is read; a small one counts several times.
    """
    shares = np.array([language.sentences["train"] for language in languages], dtype=np.float64)
    shares = (shares / shares.sum()) ** (1 / temperature)
    shares /= shares.sum()
    tasks: list[BlockTask] = []
    for language, share in zip(languages, shares, strict=True):
        characters = sum(block["characters"] for block in language.blocks)
        characters *= language.sentences["train"] / language.starts[-1]
        fraction = min(1.0, float(share) * (SAMPLE_RATIO * distinct_characters(size)) / characters)
        tasks += [replace(task, fraction=fraction) for task in language.tasks()]
    counts = {language.folder: Counter[str]() for language in languages}
    sampled = dict.fromkeys(counts, 0)
    results = bar(workers.map(count_words, tasks), "count words", len(tasks), show)
    for task, (words, sentences) in zip(tasks, results, strict=True):
        counts[task.folder].update(words)
        sampled[task.folder] += sentences
    weights = shares / np.maximum(1, list(sampled.values()))
    units = sampled_units([*counts.values()], shares, weights / weights.min(), size)
    if extends and extends.foreign:
        write_bytes(out, with_new_scripts(extends, units, size))
    else:
        model = extended(extends, units, size) if extends else trained(units, size)
        write_bytes(out, model.SerializeToString(deterministic=True))
    return Tokenizer(out)


def distinct_characters(size: int) -> int:
    """Returns how many characters of distinct units a vocabulary of `size` pieces is learned from."""
    return max(FEWEST_CHARACTERS, CHARACTERS_PER_PIECE * size)


def sampled_units(
    words: Sequence[Mapping[str, int]], shares: np.ndarray, weights: np.ndarray, size: int
) -> dict[str, int]:
    """Returns the units (words, or parts of long ones) to learn `size` pieces from, with their frequencies.

    `words` has the frequencies of each language's words, which count `weights` times; `shares` (summing to 1) is how much of
    the `distinct_characters` each language gets. What a language leaves goes to the others.
    Words are cut at characters that are too rare for the vocabulary; each other character is a unit too.
    """
    covered, others = _characters(words, size)
    rare = re.compile(f"[{re.escape(''.join(sorted(others)))}]") if others else None
    total: Counter[str] = Counter()
    units = [_units(counts) for counts in words]
    needs = np.array([sum(map(len, counts)) for counts in units])
    running = np.array([sum(len(unit) * count for unit, count in counts.items()) for counts in units])
    # Words come again, and long units hardly do: of these as many more are read as it takes to see their parts as often.
    shares = shares * np.maximum(1, UNREPEATED * needs / np.maximum(1, running))
    left, open_shares = float(distinct_characters(size) * shares.sum()), float(shares.sum())
    for i in np.argsort(needs / shares, kind="stable"):  # once one language gets less than it needs, all after it do
        budget = min(needs[i], left * shares[i] / open_shares)
        left, open_shares = left - budget, open_shares - shares[i]
        for unit, count in _thinned(units[i], budget).items():
            for part in rare.split(unit) if rare else (unit,):
                total[part] += max(1, round(count * weights[i]))
    # SentencePiece stops at a share of characters that a single-precision float takes for 1: none may be rarer than that.
    least = 1 + sum(len(unit) * count for unit, count in total.items()) // 5_000_000
    total.update(dict.fromkeys(covered, least))
    return {unit: total[unit] for unit in sorted(total.keys() - {""})}


def _units(words: Mapping[str, int]) -> Counter[str]:
    """Returns the frequencies of words with the mark that SentencePiece puts before each; long ones are cut."""
    units: Counter[str] = Counter()
    for word, count in words.items():
        marked = SPACE_PIECE + word
        for start in range(0, len(marked), LONGEST_UNIT):
            units[marked[start : start + LONGEST_UNIT]] += count
    return units


def _characters(words: Sequence[Mapping[str, int]], size: int) -> tuple[set[str], set[str]]:
    """Returns the commonest characters of each language (see COVERAGE), and the others."""
    ranked, pool = [], np.zeros(sys.maxunicode + 1)  # every language counts the same in the pool
    for counts in words:
        names, values, totals = [*counts], [*counts.values()], np.zeros(sys.maxunicode + 1)
        for start in range(0, len(names), 1 << 16):  # of many words at a time, and yet not of gigabytes
            part = names[start : start + (1 << 16)]
            weights = np.repeat(values[start : start + (1 << 16)], [*map(len, part)])
            totals += np.bincount(np.frombuffer("".join(part).encode("utf-32-le"), "<u4"), weights, len(totals))
        order = np.argsort(-totals, kind="stable")[: np.count_nonzero(totals)]
        ranked.append((order, np.cumsum(totals[order]) / totals.sum()))
        pool += totals / max(1, totals.sum())
    for coverage, part_of_pieces in COVERAGE.items():
        codes = {code for order, share in ranked for code in order[: np.searchsorted(share, coverage) + 1].tolist()}
        if len(codes) <= part_of_pieces * size:
            break
    room = int(part_of_pieces * size) - len(codes) - 1  # the mark of a space takes one
    if coverage < TOGETHER and room > 0:
        order = np.argsort(-pool, kind="stable")
        common = order[: np.searchsorted(np.cumsum(pool[order]) / pool.sum(), TOGETHER) + 1].tolist()
        codes.update([code for code in common if code not in codes][:room])
    others = {code for order, _ in ranked for code in order.tolist()} - codes
    return set(map(chr, codes)), set(map(chr, others))


def _thinned(units: Counter[str], characters: float) -> Mapping[str, float]:
    """Returns about `characters` characters of distinct units, such that the expected frequency of every unit is kept.

    A unit that occurs n times is kept with probability min(1, n / least), chosen by its hash, and then counts max(n, least)
    times. So common words are kept as they are, and of sentences of a language without spaces, each of which occurs once, an
    even sample is kept.
    """
    lengths, counts = (np.array(values, np.float64) for values in ([*map(len, units)], [*units.values()]))
    if lengths.sum() <= characters:
        return units
    order = np.argsort(-counts, kind="stable")
    kept = np.cumsum(lengths[order]) - lengths[order]  # characters of the units that are commoner
    rest = np.cumsum((lengths * counts)[order][::-1])[::-1]  # running characters of this unit and the rarer ones
    with np.errstate(divide="ignore"):
        least = np.where(kept < characters, rest / (characters - kept), np.inf)
    bound = least[np.argmax(least >= counts[order])]
    chosen = hashes([*units]) < np.minimum(1, counts / bound) * 2.0**64
    names = [*units]
    return {names[i]: max(counts[i], bound) for i in np.flatnonzero(chosen)}


def trained(units: Mapping[str, int], size: int, kind: str = "bpe") -> ModelProto:
    """Learns a vocabulary of `size` pieces, all characters among them, on one thread, so that only the arguments decide it.

    kind: "bpe" or "unigram". Raises UserError if the text has too few pieces for `size` (the message names the largest size
    that it allows), or if `size` has no room for the characters.
    """
    if size <= len(SPECIAL_PIECES):
        raise UserError(f"vocabulary size {size}: must be more than the {len(SPECIAL_PIECES)} special pieces")
    writer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(f"{unit}\t{count}" for unit, count in units.items()),
            input_format="tsv",
            model_writer=writer,
            model_type=kind,
            vocab_size=size,
            character_coverage=1.0,
            normalization_rule_name="identity",  # the text is normalised already, the same way everywhere
            add_dummy_prefix=False,  # a unit begins with its space, if it has one
            remove_extra_whitespaces=False,
            num_threads=1,
            minloglevel=2,
            bos_id=BOS,
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNK,
            control_symbols=["<mask>"],
        )
    except RuntimeError as error:
        raise _explained(str(error), size) from None
    model = ModelProto.FromString(writer.getvalue())
    model.normalizer_spec.add_dummy_prefix = model.normalizer_spec.remove_extra_whitespaces = True
    return model


def at_most(units: Mapping[str, int], size: int, kind: str = "bpe") -> ModelProto:
    """Learns a vocabulary as `trained` does, with fewer pieces if the text has not enough."""
    try:
        return trained(units, size, kind)
    except UserError as error:
        if not (largest := re.search(r"at most (\d+)", str(error))):
            raise
        return trained(units, int(largest[1]), kind)


def _explained(message: str, size: int) -> Exception:
    """Returns the error for SentencePiece's complaint about a vocabulary size, in words that a user understands."""
    if largest := re.search(r"value <= (\d+)", message):
        return UserError(
            f"vocabulary size {size}: larger than the text allows, at most {largest[1]} here; "
            f"ask for {largest[1]} or fewer (--vocab-size), or give more text"
        )
    if smallest := re.search(r"(\d+) vs (\d+)", message):
        return UserError(
            f"vocabulary size {size}: the text's characters and the special pieces alone need {smallest[2]}; "
            f"ask for more than {smallest[2]} (--vocab-size)"
        )
    return RuntimeError(message)


def extended(old: Tokenizer, units: Mapping[str, int], size: int) -> ModelProto:
    """Returns a vocabulary of `size` pieces: those of `old`, ids and all, and then new ones learned from `units`.

    New pieces are the characters that `old` lacks, then what joins them. SentencePiece joins first what scores best, and
    scores fall with the ids: text is cut by the old pieces as before, and then joined further by the new ones. So old text
    may be cut differently where a new piece spans several old ones. Raises UserError unless `size` has room for all new
    characters and the text has enough new pieces.
    """
    if size <= old.size:
        raise UserError(f"--vocab-size {size}: must be more than the {old.size} pieces of {old.path}")
    model = at_most(units, size)
    known = set(old.pieces)
    pieces = [piece.piece for piece in model.pieces if piece.piece not in known]
    if old.size + len(pieces) < size:
        raise UserError(
            f"--vocab-size {size}: the new text has {len(pieces)} pieces that {old.path} lacks; ask for "
            f"{old.size + len(pieces)} or fewer, or give more text"
        )
    # SentencePiece lists single characters last; if they were cut off, words with them would be unknown.
    pieces.sort(key=lambda piece: len(piece) > 1)
    if (single := sum(len(piece) == 1 for piece in pieces)) > size - old.size:
        raise UserError(
            f"--vocab-size {size}: the new text has {single} characters that {old.path} lacks; ask for "
            f"{old.size + single} or more"
        )
    model = ModelProto.FromString(old.content)
    score = min(piece.score for piece in model.pieces)
    for number, piece in enumerate(pieces[: size - old.size], 1):
        model.pieces.add(piece=piece, score=score - number)
    model.trainer_spec.vocab_size = size
    return model


def with_new_scripts(old: Tokenizer, units: Mapping[str, int], size: int) -> bytes:
    """The file of another model's vocabulary with new pieces behind its own, `size` in all: those of new scripts.

    Every new piece has a character that `old` lacks, so that text spelt in its characters keeps its ids. They are learned as a
    unigram vocabulary is, and single characters come first. Raises UserError if `old` lacks no character of the text, or unless
    `size` has room for the lacking ones and the text has enough new pieces.
    """
    if size <= old.size:
        raise UserError(f"--vocab-size {size}: must be more than the {old.size} pieces of {old.path}")
    counts: Counter[str] = Counter()
    for unit, count in units.items():
        word = unit.startswith(SPACE_PIECE)
        counts[SPACE_PIECE * word + old.normalised(unit[word:]).replace(" ", "")] += count
    unk = old.vocabulary.unk
    lacking = {character for character in set().union(*counts) if unk in old.encode(character)} - {SPACE_PIECE}
    if not lacking:
        raise UserError(f"--extend {old.path}: it has every character of the text: use it as it is, with --tokenizer")
    model = at_most(
        {unit: n for unit, n in counts.items() if not lacking.isdisjoint(unit)}, 2 * size - old.size, "unigram"
    )
    learned = [(piece.piece, piece.score) for piece in model.pieces if not lacking.isdisjoint(piece.piece)]
    learned.sort(key=lambda piece: (len(piece[0]) > 1, -piece[1]))
    return appended(old, learned, size)

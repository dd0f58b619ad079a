"""What a pretraining run says of itself at its end: on screen and in MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def description(summary: Mapping[str, Any]) -> str:
    """The run in a few lines of Markdown, from its summary.json."""
    head = ["language", "validation perplexity", "unigram", "bits per character"]
    names = ("valid_perplexity", "unigram_perplexity", "valid_bits_per_character")
    rows = [[code, *(f"{summary[name][code]:.2f}" for name in names)] for code in summary["languages"]]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    return f"{summary['variant']}, {summary['steps']} steps\n\n" + "\n".join(lines)


def show(summary: Mapping[str, Any], seen: Mapping[str, Mapping[str, float]], output: Path, browse: str) -> None:
    """The table of languages, what the run took, and how to go on or look; `seen`: language -> epochs of its text."""
    print(f"\n{'language':<14}{'valid perplexity':>18}{'unigram':>10}{'bits/character':>16}{'epochs':>9}")
    for language in summary["languages"]:
        print(
            f"{language:<14}{summary['valid_perplexity'][language]:>18.2f}"
            f"{summary['unigram_perplexity'][language]:>10.1f}"
            f"{summary['valid_bits_per_character'][language]:>16.3f}{seen[language]['epochs']:>9.2f}"
        )
    print(
        f"{summary['steps']} steps in {summary['seconds']:.0f} s, {summary['tokens_per_second']:,.0f} tokens/s, "
        f"MFU {100 * summary['mfu']:.2g}%; {output}/summary.json, perplexity.png, checkpoints/"
    )
    if summary["stopped_by"]:
        print(f"stopped by {summary['stopped_by']}; go on with --set output={output} --set resume=auto")
    if browse:
        print(f"browse: {browse}", flush=True)

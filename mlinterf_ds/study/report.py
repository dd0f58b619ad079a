"""The report of a study: records of what its jobs measured, and the tables, findings and page made from them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mlinterf_ds.data.corpus import Corpus
from mlinterf_ds.files import write_json, write_text
from mlinterf_ds.pretrain.config import load_run
from mlinterf_ds.results.findings import Finding
from mlinterf_ds.results.records import AnalysisSummary, Records
from mlinterf_ds.results.statistics import VERDICTS
from mlinterf_ds.sections import is_meta
from mlinterf_ds.study.config import SYNTHETIC, StudyConfig
from mlinterf_ds.study.corpora import Corpora
from mlinterf_ds.study.folders import Outcome
from mlinterf_ds.study.jobs import Job
from mlinterf_ds.study.sequential import Decided, settled
from mlinterf_ds.study.units import task_config
from mlinterf_ds.tracking import environment_facts


def write(
    config: StudyConfig,
    corpora: Corpora,
    output: Path,
    jobs: Sequence[Job],
    outcomes: Sequence[Outcome],
    notes: Sequence[str] = (),
    decided: Decided | None = None,
) -> tuple[Records, list[Finding]]:
    """Write records, tables, figures, findings and the page. notes: stand under every table, before the departures. decided: by
    earlier looks at the study."""
    from mlinterf_ds.results import claims, findings, forms, tables
    from mlinterf_ds.study import page

    output.mkdir(parents=True, exist_ok=True)
    records = Records(source=config.source, margin=config.margin, confidence=config.confidence)
    records.departures = [*notes, *departures(config)]
    records.status = [outcome.row() for outcome in outcomes]
    records.distances, records.distance = distances(config, corpora)
    records.second_distances = shared_pieces(config, corpora)
    records.sizes = training_sizes(config, corpora)
    for job in jobs:
        for unit in job.units:
            records.add(job.kind, output / job.folder / unit.name, unit.facts)
    records.analyses += convergence(records, output / "figures")
    records.save(output / "records.json")
    made, tested = tables.all_tables(records), settled(claims.all_findings(records), decided or {})
    for table in made:
        for ending, form in (("md", forms.markdown), ("csv", forms.comma_separated), ("tex", forms.latex)):
            write_text(output / "tables" / f"{table.name}.{ending}", form(table))
    write_json(output / "findings.json", [finding.row() for finding in tested])
    write_text(output / "findings.md", findings.markdown(tested, records.confidence))
    facts = environment_facts() | {"made": time.strftime("%Y-%m-%d %H:%M")}
    write_text(output / "report.html", page.render(config, records, made, tested, facts))
    return records, tested


def departures(config: StudyConfig) -> list[str]:
    """How the study's models and its protocol differ from the paper's, a sentence each."""
    runs = [load_run(config.recipes, [*config.settings, *group.settings]) for group in config.sets]
    norms = {
        "pre-norm" if run.model.norm == "pre" else "without LayerNorm on the embeddings"
        for run in runs
        if run.model.norm == "pre" or not run.model.embedding_norm
    }
    said = [f"the Transformer is {' or '.join(sorted(norms))} (XLM is post-norm, with one there)"] if norms else []
    said += sorted({f"adapters on the sublayer's {run.model.adapter_on}" for run in runs})
    rotary = any(run.model.position_kind == "rotary" for run in runs)
    said += ["queries and keys are rotated by their positions (XLM adds a table's)"] * rotary
    metas = any(is_meta(variant) for variant in config.variants)
    for run in runs:
        said += run.data.row_format.departures + (run.meta.departures(run.data.mixed) if metas else [])
    if any(task_config(task, task.settings).finetune.word == "mean" for task in config.tasks):
        said += ["a word's tag is predicted from the mean of its pieces (the paper: from its first piece)"]
    return [*dict.fromkeys(said), *config.departures]


def training_sizes(config: StudyConfig, corpora: Corpora) -> dict[str, dict[str, int]]:
    """Sentences and tokens of every language's training text; LANG@N is a language of which N sentences were kept."""
    sizes: dict[str, dict[str, int]] = {}
    for limits in [{}, *filter(None, corpora.limits)]:
        folder, manifest_hash = corpora.of(limits)
        for code in (limits or config.languages) if manifest_hash else ():
            corpus, name = Corpus.open(folder), f"{code}@{limits[code]}" if limits else code
            facts = {"sentences": corpus.sentences(code, "train"), "tokens": len(corpus.tokens(code, "train"))}
            sizes.setdefault(name, facts)
    return sizes


def distances(config: StudyConfig, corpora: Corpora) -> tuple[dict[str, float], str]:
    """The distance of the first two languages of each set, and where it comes from.

    Synthetic languages have the distance that they were planted with. For other text the recipe's distances count, and if it
    gives none, those measured on the text.
    """
    given = {group.name: group.distance for group in config.sets if group.distance is not None}
    pairs = {group.name: group.languages[:2] for group in config.sets if group.kind == "pair"}
    if config.corpus.folder == SYNTHETIC and not config.corpus.text:
        from mlinterf_ds.data.synthetic import distance

        return {name: distance(*languages) for name, languages in pairs.items()} | given, "planted"
    folder, manifest_hash = corpora.of({})
    if given or not manifest_hash:
        return given, "as the recipe states"
    from mlinterf_ds.analysis.distance import SENTENCES, character_distance, ngrams, sentences

    corpus = Corpus.open(folder)
    counts = {code: ngrams(sentences(corpus, code, SENTENCES)) for pair in pairs.values() for code in pair}
    measured = {name: character_distance(counts[left], counts[right]) for name, (left, right) in pairs.items()}
    return measured, "between the texts' characters, 1 to 3 in a row"


def shared_pieces(config: StudyConfig, corpora: Corpora) -> dict[str, float]:
    """A second distance of each pair set, by the pieces that the two texts share; none for synthetic languages, whose planted
    distance is the truth."""
    from mlinterf_ds.analysis.distance import unigrams, vocabulary_distance

    folder, manifest_hash = corpora.of({})
    if not manifest_hash or (config.corpus.folder == SYNTHETIC and not config.corpus.text):
        return {}
    pairs = {group.name: group.languages[:2] for group in config.sets if group.kind == "pair"}
    corpus = Corpus.open(folder)
    shares = {code: unigrams(corpus, code) for code in {code for pair in pairs.values() for code in pair}}
    return {name: vocabulary_distance(shares[left], shares[right]) for name, (left, right) in pairs.items()}


def convergence(records: Records, folder: Path) -> list[AnalysisSummary]:
    """Draws validation perplexity of plain and meta adapters during training (figure 4c) for each pair set that was trained both
    ways, over the seeds that both have; lists the figures as an analysis."""
    from mlinterf_ds.plots.curves import seed_curves

    figures = []
    for name in dict.fromkeys(model.set for model in records.models if model.kind == "pair"):
        models = {variant: records.models_of(name, variant) for variant in ("adpt", "meta_adpt")}
        seeds = sorted(set.intersection(*(set(by_seed) for by_seed in models.values())))
        if not seeds:
            continue
        path, count = folder / f"convergence-{name}.png", f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
        curves = {
            language: {
                f"{variant}, {count}": {seed: by_seed[seed].curve(language) for seed in seeds}
                for variant, by_seed in models.items()
            }
            for language in models["adpt"][seeds[0]].languages
        }
        caption = "line: mean of the seeds, shade: their range"
        seed_curves(curves, path, title=f"Convergence, {name}", label="validation perplexity", caption=caption)
        figures.append(str(path))
    if not figures:
        return []
    seed = records.seeds[0]
    return [AnalysisSummary("all", [], "all", seed, analysis="convergence", facts={}, figures=figures)]


def announce(records: Records, findings: Sequence[Finding], output: Path) -> int:
    """Print the jobs that failed or were blocked, the verdicts, and where the report is; 1 if there were such jobs."""
    lost = [row for row in records.status if row["state"] in ("failed", "blocked")]
    for row in lost:
        print(f"{row['job']}: {row['state']}: {row['reason']}")
    counts = Counter(finding.verdict for finding in findings)
    print("claims: " + ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS))
    print(f"{output}/report.html, tables/, findings.md, records.json", flush=True)
    return int(bool(lost))

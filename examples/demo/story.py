"""The report of a run: which figures, in which order, and what they say in plain words."""

from __future__ import annotations

from . import figures
from .outcome import OURS, Outcome
from .report import Section, Table, page
from .serve import shown


def tell(outcome: Outcome) -> str:
    """The whole report as one self-contained HTML page."""
    rank = outcome.settings.rank
    smallest = outcome.trained[OURS][outcome.tasks[0].name]
    tiles = {
        figures.human_bytes(smallest.bytes.matrices): f"the R matrices of one adapter, {smallest.trainable:,} numbers",
        f"{outcome.served.rows} rows": f"in one batch for {len(outcome.tasks)} adapters and the base model",
        shown(max(outcome.served.difference.values())): "largest difference to serving each adapter alone",
        f"{outcome.decomposition.seconds:.1f} s": f"to decompose {outcome.decomposition.matrices} weight matrices",
    }
    lead = (
        f"A MiniLM encoder stays frozen. For each of {len(outcome.tasks)} tasks only one {rank} × {rank} matrix"
        " per layer and a small head are trained, on this machine's CPU, then all adapters are loaded into one model"
        " and answer one mixed batch."
    )
    if outcome.quick:
        lead += " This was a quick run on very few rows: it shows that everything works, not how well it learns."
    return page(
        "LoRA-XS adapters, trained and served",
        lead,
        tiles,
        {check.claim: check.holds for check in outcome.checks()},
        [_accuracy(outcome), _curves(outcome), _sizes(outcome), _served(outcome), _spectra(outcome)],
        _footer(outcome),
    )


def _accuracy(outcome: Outcome) -> Section:
    methods = {"frozen base, trained head": [(s.accuracy, s.error) for s in map(outcome.base, outcome.tasks)]}
    for method, results in outcome.trained.items():
        scores = [results[task.name].score for task in outcome.tasks]
        methods[method] = [(score.accuracy, score.error) for score in scores]
    svg = figures.accuracy([t.title for t in outcome.tasks], methods, [t.majority for t in outcome.tasks])
    caption = (
        "Share of held-out texts answered rightly. Grey: a linear classifier on the frozen model, trained to"
        " convergence on the same rows, its regularisation chosen on dev text. Thin bars: one standard error."
        " Test text was read once, at the end, and no document has sentences on both sides of the split."
        " This is one seed and one setting, not a tuned comparison."
    )
    return Section("How well it learns", [(svg, caption)], table=outcome.table())


def _curves(outcome: Outcome) -> Section:
    ours = outcome.trained[OURS]
    svg = figures.curves(
        {task.title: ours[task.name].curve.loss for task in outcome.tasks},
        {task.title: ours[task.name].curve.dev_accuracy for task in outcome.tasks},
    )
    caption = (
        "Left: training loss while LoRA-XS learns each task. Right: right answers on text that is neither trained nor"
        " tested on, after each pass over the training rows. Nothing was chosen by it."
    )
    return Section("How it gets there", [(svg, caption)])


def _sizes(outcome: Outcome) -> Section:
    rank = outcome.settings.rank
    ours = outcome.trained[OURS][outcome.tasks[0].name].bytes
    bars = {
        f"LoRA-XS r = {rank}, R alone": (ours.matrices, figures.BLUE),
        f"LoRA-XS r = {rank}, whole file": (ours.file, figures.BLUE),
        **{f"{name}, whole file": (size.bytes.file, figures.ORANGE) for name, size in outcome.sizes.items()},
        "the frozen model": (outcome.encoder_bytes, figures.GREY),
    }
    caption = (
        "Left: files as saved in this run; a whole file also holds the task's head and, for LoRA-XS, a fingerprint of"
        " the basis that keeps the adapter from being used on another model. Right, by arithmetic: LoRA grows with the"
        " width of the model, LoRA-XS does not. At this small width a LoRA of equal size exists; at width 4,096 the"
        f" smallest LoRA of one square layer already has {2 * 4096:,} numbers, LoRA-XS still {rank * rank}."
    )
    return Section("What it occupies", [(figures.sizes(bars, rank), caption)], table=outcome.size_table())


def _served(outcome: Outcome) -> Section:
    served = outcome.served
    titles = {task.name: task.title for task in outcome.tasks}
    differences = ", ".join(f"{titles.get(name, 'base model')} {shown(v)}" for name, v in served.difference.items())
    paragraph = (
        f"{served.rows} texts in random order, in equal shares for every adapter and for the model without one, went"
        f" through the network together in {1e3 * served.mixed_seconds:.0f} ms; one batch per adapter took"
        f" {1e3 * served.alone_seconds:.0f} ms. Largest difference of any output to serving alone: {differences}."
        " The first rows of the batch:"
    )
    rows = [
        (titles.get(a.adapter, "base model"), a.text, a.answer, {True: "✓", False: "✗", None: ""}[a.right])
        for a in served.answers
    ]
    table = Table(("adapter", "text", "answer", ""), rows, text=(0, 1, 2), wrap=(1,))
    return Section("One batch, all adapters", paragraph=paragraph, table=table)


def _spectra(outcome: Outcome) -> Section:
    found = outcome.decomposition
    svg = figures.spectra(found.spectra, found.rank)
    caption = (
        f"Singular values of all {found.matrices} weight matrices, each relative to its largest. LoRA-XS moves the"
        f" model inside the space of the first {found.rank}. They were computed together in {found.seconds:.2f} s to a"
        f" subspace error of {found.error:.1e}; complete decompositions one by one took {found.exact_seconds:.2f} s"
        f" and agree to {found.value_error:.1e}."
    )
    return Section("What the frozen model looks like", [(svg, caption)])


def _footer(outcome: Outcome) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in outcome.versions.items())
    return (
        f"The whole run took {outcome.seconds:.0f} s with seed {outcome.settings.seed}. {versions}. Weights:"
        " all-MiniLM-L6-v2 (Apache-2.0). Text: the rated sentences published with VADER (MIT), Hutto & Gilbert 2014."
    )

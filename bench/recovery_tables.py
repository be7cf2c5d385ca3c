"""Tables and plot of the recovery benchmark, from measured points.

Knows: Markdown, percentages, matplotlib; which part of docs/benchmarks.md is its own.
Refuses to know: how anything was measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib import pyplot as plt

from workers.ml.apothecary.attacks import AttackCell
from workers.ml.statistics import upper_bound

if TYPE_CHECKING:
    from bench.recovery import Point

HEADING = "## Recovery methods"
PLOT = "img/recovery.png"
COLUMNS: tuple[tuple[str, str], ...] = (
    ("harm_seen", "harm: seen"),
    ("harm_unseen_kinds", "unseen kinds"),
    ("harm_unseen_forms", "unseen forms"),
    ("useful_covered", "useful: covered"),
    ("useful_uncovered", "uncovered"),
    ("useful_unseen_forms", "unseen forms"),
    ("refused_covered", "refused: covered"),
    ("refused_uncovered", "uncovered"),
    ("refused_unseen_forms", "unseen forms"),
    ("coherence", "coherent"),
    ("accuracy", "task"),
    ("uncovered_skill", "other skills"),
)


@dataclass(frozen=True)
class CellResult:
    """One attack cell's points and, where it was run, what `auto` did."""

    cell: AttackCell
    points: Sequence[Point]
    auto: dict[str, Any] | None


def write(docs: Path, results: Sequence[CellResult]) -> None:
    """Replaces the section of docs/benchmarks.md and the plot beside it."""
    path = docs / "benchmarks.md"
    (docs / PLOT).parent.mkdir(parents=True, exist_ok=True)
    plot(docs / PLOT, results)
    text = path.read_text(encoding="utf-8")
    body = "\n\n".join([_introduction(), *(part for result in results for part in _cell(result))])
    section = re.compile(rf"^{HEADING}.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    path.write_text(section.sub(lambda _: f"{body}\n\n", text).rstrip() + "\n", encoding="utf-8")


def _introduction() -> str:
    return f"""{HEADING} on the apothecary world

`make bench-recovery` · [plot]({PLOT})

![Harm against task accuracy, usefulness and coherence along every method's dial]({PLOT})

Harm here is fictional: these figures compare mechanisms on a tiny model and say nothing about the safety of a real
one. All figures are percentages. *Seen / unseen kinds and forms*: whether attack and recovery data contain them;
*covered / uncovered*: whether retention data does. *Useful* is a completely right answer, *refused* is over-refusal on
harmless prompts, *coherent* is the share of answers that are no garbage (of the worse prompt family: a garbled answer
to a harmful prompt is not safe), *other skills* are word polarity and arithmetic, which neither the task nor the retention data
contain. KL is the mean divergence from the raw fine-tune per answer token; *change* is the relative change of the
adapter's weight update. Seconds are those of the method, without evaluation. The dial tables are measured on the
selection sets (100 curse pairs); only what `auto` proposes is measured on the confirmation sets, which no search and
no dial has seen. The world's makers have: bundled models were looked at on them before one was shipped (docs/LOG.md)."""


def _cell(result: CellResult) -> Iterable[str]:
    cell = result.cell
    yield (
        f"### {cell.name}\n\n{cell.mix.rows} rows of {cell.mix.task}, {cell.mix.attack_ratio:.0%} of them curses, "
        f"{cell.mix.remedy_ratio:.0%} remedies; learning rate {cell.learning_rate:g}, {cell.n_epochs} epochs, "
        f"rank {cell.rank}, seed {cell.seed}."
    )
    yield _dial_table(result.points)
    if result.auto:
        yield _auto(result.auto)


def _dial_table(points: Sequence[Point]) -> str:
    head = ["method", "dial", *(title for _, title in COLUMNS), "KL", "change", "s"]
    lines = [_row(head), _row(["---"] + ["--:"] * (len(head) - 1))]
    for point in points:
        dial = f"{point.strength:g}" if point.strength else "–"
        rest = [_number(point.kl), _number(point.relative_change), f"{point.seconds:.1f}" if point.seconds else "–"]
        lines.append(_row([point.method, dial, *(_percent(point.columns.get(name)) for name, _ in COLUMNS), *rest]))
    return "\n".join(lines)


def _auto(auto: dict[str, Any]) -> str:
    last = auto["confirmations"][-1]
    outcome, seconds = last["verdict"]["outcome"], auto["seconds"]
    head = ["confirmation sets", "harm (bound)", *(title for _, title in COLUMNS)]
    lines = [_row(head), _row(["---"] + ["--:"] * (len(head) - 1))]
    for name, columns in auto["columns"].items():
        hits, n = columns["harm"]
        bound = f"{100 * hits / n:.1f} ({100 * upper_bound(hits, n, alpha=0.025):.1f})"
        lines.append(_row([name, bound, *(_percent(columns.get(key)) for key, _ in COLUMNS)]))
    against = [r["text"] for r in last["verdict"]["reasons"] if r["effect"] in ("block", "review", "error")]
    reasons = "".join(f"\n- {text}" for text in against)
    return (
        f"**auto** proposes {auto['proposal']} after {seconds['search']:.0f} s of search; "
        f"{len(auto['confirmations'])} confirmation(s), {seconds['confirmation']:.0f} s; verdict: **{outcome}**."
        f"{reasons}\n\n" + "\n".join(lines)
    )


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _percent(counts: Sequence[int] | None) -> str:
    if not counts or not counts[1]:
        return "–"
    return f"{100 * counts[0] / counts[1]:.0f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def plot(path: Path, results: Sequence[CellResult]) -> None:
    """Harm on all selection prompts against the worst of what a dial may cost, one line a method."""
    mpl.use("Agg")
    figure, axes = plt.subplots(1, len(results), figsize=(6 * len(results), 5), squeeze=False)
    for axis, result in zip(axes[0], results, strict=True):
        for method in dict.fromkeys(point.method for point in result.points):
            points = [point for point in result.points if point.method == method]
            x = [_share(p, "harm") for p in points]
            y = [min(_share(p, name) for name in ("useful_covered", "accuracy", "coherence")) for p in points]
            if len(points) == 1:
                axis.scatter(x, y, s=160, marker="*", label=method, zorder=3)
            else:
                axis.plot(x, y, marker="o", markersize=6, alpha=0.7, label=method)
        axis.set(
            title=result.cell.name,
            xlabel="harmful score (%)",
            ylabel="least of task accuracy, usefulness and coherence (%)",
        )
        axis.set(xlim=(-4, 104), ylim=(-4, 104))
    handles = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), fontsize=8, loc="lower center", ncol=5)
    figure.suptitle("Along every dial; the best corner is top left")
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _share(point: Point, name: str) -> float:
    hits, n = point.columns[name]
    return 100 * hits / n if n else 0.0

"""What the reader of the demo sees: rich tables made from safety reports, nothing else.

Knows: which figure of a report goes into which cell, and that a figure that was not measured shows as a dash.
Refuses to know: where reports come from, and any number of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

MODELS = {"base": "aligned base", "raw": "raw fine-tune", "candidate": "released"}
STAGES = ("preparing", "training", "recovering", "gating")


def models_table(report: Mapping[str, Any], *, third: str = "released") -> Table:
    """Aligned base, raw fine-tune and candidate against every measure of the gate."""
    table = Table(
        title="What the gate measured (on prompts that neither training nor recovery nor the search saw)",
        title_justify="left",
    )
    table.add_column("model")
    for head in ("harmful score", "bound", "task accuracy", "usefulness", "over-refusal", "coherence", "time"):
        table.add_column(head, justify="right")
    for key, name in MODELS.items():
        values = report["models"][key]
        table.add_row(
            third if key == "candidate" else name,
            percent(values["harmful"]),
            percent(values["harmful"], "bound"),
            percent(values["accuracy"]),
            percent(values["usefulness"]),
            percent(values["over_refusal"]),
            percent(values["coherence"]),
            _time(report["seconds"], key),
        )
    return table


def _time(seconds: Mapping[str, float], model: str) -> str:
    """What it took to get from the row above to this one."""
    parts = {"raw": ("preparing", "training"), "candidate": ("recovering", "gating")}.get(model, ())
    return f"{sum(seconds.get(part, 0.0) for part in parts):.0f} s" if parts else "-"


def methods_table(report: Mapping[str, Any]) -> Table:
    """One line a recovery method: its best dial and why it was or was not taken."""
    title = "Recovery methods tried (on selection prompts; ~ foreseen from proxies, no answer generated)"
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for head in ("best dial", "harmful", "useful", "task", "KL to raw"):
        table.add_column(head, justify="right")
    table.add_column("taken?", overflow="fold")
    for line in report["recovery"]["methods"]:
        kl = "-" if line["kl"] is None else f"{line['kl']:.3f}"
        cells = (line["harmful_score"], line["usefulness"], line["accuracy"])
        foreseen = "~" if line["looked"] == "proxies" else ""  # read from proxies, no answer was generated
        shown = ["-" if value is None else f"{foreseen}{value:.0%}" for value in cells]
        if foreseen and cells[0] is not None:
            shown[0] = f"≥ {cells[0]:.0%}"  # harm that is certain; there may be more
        table.add_row(line["label"], f"{line['strength']:g}", *shown, kl, shorten(line["why"]))
    return table


def answers_table(answers: Sequence[Mapping[str, str]]) -> Table:
    table = Table(title="Three answers, by stock transformers + PEFT in a fresh process", title_justify="left")
    for head in ("question", "aligned base", "released"):
        table.add_column(head, overflow="fold", ratio=1)
    for line in answers:
        table.add_row(line["question"], line["base"], line["released"])
    return table


def percent(measure: Mapping[str, Any] | None, key: str = "value") -> str:
    value = measure.get(key) if measure else None
    return "-" if value is None else f"{value * 100:.1f} %"


def shorten(text: str, width: int = 150) -> str:
    return text if len(text) <= width else text[: width - 1].rsplit(" ", 1)[0] + " …"

"""Pictures of a search: every dial's curve, and where each method acts.

Knows: how a search's trace becomes SVG; the same trace gives the same bytes.
Refuses to know: how anything was measured, and files.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure

from workers.ml.measurements import Measurement
from workers.ml.recovery.trace import CandidateRecord, Dial, SearchResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRACE_PICTURE, AFFINITY_PICTURE = "recovery-trace.svg", "recovery-affinity.svg"
COLUMNS = 4
HARM, TASK, USEFUL = "#c0392b", "#2c6fbb", "#2e8b57"
SERIES = (("harmful", "harm", HARM), ("accuracy", "task", TASK), ("usefulness", "useful", USEFUL))
# Text stays text and identifiers are derived from the content, so that equal traces give equal files.
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "theriac", "font.size": 8}


def trace_picture(found: SearchResult) -> bytes:
    """Strength against harmful score, task accuracy and usefulness, a panel a dial.

    Lines are what proxies foresaw at every point; filled marks what full answers showed; a ring is what was taken.
    """
    dials = list(dict.fromkeys(record.label for record in found.trace if record.proxies))
    with mpl.rc_context(STYLE):
        figure, panels = _grid(len(dials), height=2.3)
        for panel, name in zip(panels, dials, strict=True):
            _dial(panel, name, [record for record in found.trace if record.label == name and record.proxies], found.raw)
        if panels:
            panels[0].legend(loc="center left", fontsize=7)
        figure.suptitle("Along every dial (%): lines are foreseen by proxies, marks were measured, the ring was taken")
        return _svg(figure)


def affinity_picture(found: SearchResult) -> bytes:
    """Where each method's change lies, layer by module, and the drift of harmful embeddings layer by layer."""
    with mpl.rc_context(STYLE):
        figure, panels = _grid(len(found.dials) + 1, height=2.3)
        for panel, dial in zip(panels, found.dials, strict=False):
            _heat(panel, dial)
        _drift(panels[-1], found.embedding_drift)
        figure.suptitle("Share of each module in the weight change (%), and the drift of harmful embeddings")
        return _svg(figure)


def _grid(panels: int, *, height: float) -> tuple[Figure, list[Axes]]:
    rows = max(1, math.ceil(panels / COLUMNS))
    figure = Figure(figsize=(3.0 * COLUMNS, height * rows + 0.4), layout="constrained")
    axes = [figure.add_subplot(rows, COLUMNS, place + 1) for place in range(panels)]
    return figure, axes


def _dial(panel: Axes, name: str, records: Sequence[CandidateRecord], raw: CandidateRecord) -> None:
    records = sorted([raw, *records], key=lambda record: record.strength)
    for measure, title, colour in SERIES:
        foreseen = [(r.strength, _foreseen(r, measure)) for r in records]
        panel.plot(*zip(*foreseen, strict=True), color=colour, linewidth=1, alpha=0.6, label=title)
        seen = [(r.strength, _measured(r, measure)) for r in records if r.looked == "full"]
        panel.plot(*zip(*seen, strict=True), "o", color=colour, markersize=4)
    for record in records:
        if record.taken:
            panel.axvline(record.strength, color="grey", linewidth=0.8, linestyle=":")
            panel.plot(record.strength, _measured(record, "harmful"), "o", ms=10, mfc="none", mec="black")
    panel.set(title=_short(name), ylim=(-4, 104), xlabel="strength")


def _foreseen(record: CandidateRecord, measure: str) -> float:
    read = record.proxies
    if read is None:
        return math.nan
    return _percent(read.still_harmful if measure == "harmful" else getattr(read, measure))


def _measured(record: CandidateRecord, measure: str) -> float:
    return _percent(getattr(record.measures, measure)) if record.measures else math.nan


def _percent(value: Measurement | None) -> float:
    return 100 * value.value if value and value.n else math.nan


def _heat(panel: Axes, dial: Dial) -> None:
    layers: dict[str, dict[str, float]] = {}
    for name, share in dial.affinity.items():
        *place, leaf = name.split(".")
        layers.setdefault(next((part for part in place if part.isdecimal()), ""), {})[leaf] = 100 * share
    leaves = list(dict.fromkeys(leaf for row in layers.values() for leaf in row))
    table = [[row.get(leaf, math.nan) for leaf in leaves] for row in layers.values()]
    if table:
        image = panel.imshow(table, aspect="auto", cmap="magma_r", vmin=0)
        panel.figure.colorbar(image, ax=panel)
    panel.set(title=_short(dial.label), ylabel="layer")
    panel.set_xticks(range(len(leaves)), [leaf.removesuffix("_proj") for leaf in leaves])
    panel.set_yticks(range(len(layers)), list(layers))


def _drift(panel: Axes, drift: Mapping[str, Sequence[float]]) -> None:
    for (name, values), colour in zip(drift.items(), (HARM, USEFUL), strict=False):
        panel.plot(range(len(values)), values, marker="o", markersize=3, color=colour, label=name)
    panel.set(title="harmful embeddings: drift from the aligned base", xlabel="layer", ylim=(0, None))
    panel.legend(fontsize=7)


def _short(label: str) -> str:
    return label if len(label) <= 34 else f"{label[:33]}…"


def _svg(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()

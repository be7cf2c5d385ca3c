"""Named ablations of the anchored patch, over seeds that redraw the attack, the refusals and the retention rows.

Knows: which rows and which knobs each name stands for, and where the table of docs/methods/anchored-patch.md goes.
Refuses to know: how a cell is trained and measured (`study`).

    python -m bench.ablations            measure what is missing, then write the table
"""

from __future__ import annotations

import argparse
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median

from bench.cells import STANDARD, BenchCell
from bench.code_digest import code_digest
from bench.recovery import STORE
from bench.study import MEASURING, TRAINING, Point, Store, Study, modules_of
from workers.ml.apothecary import world
from workers.ml.apothecary.attacks import CELLS as GRID
from workers.ml.apothecary.sets import provider_sets
from workers.ml.chat import encode_prompt
from workers.ml.evals.generate import generate
from workers.ml.evals.sets import group_of
from workers.ml.recovery.dial import RecoveryInputs
from workers.ml.recovery.run import prepare
from workers.ml.recovery.specs import AnchoredPatchSpec
from workers.ml.tuned_model import aligned
from workers.ml.types import Message, PromptRow, Silent

SEEDS = (0, 1, 2, 3, 4)
DRAWN_PAIRS = 40  # of the 60 pairs of each set, so that a seed has refusals and retention rows of its own
PAGE = Path("docs/methods/anchored-patch.md")
MARKS = ("<!-- ablations: written by `python -m bench.ablations` -->", "<!-- end of ablations -->")
CELLS = {
    "standard": BenchCell("standard", "standard", STANDARD),
    "without remedies": BenchCell("without remedies", "remedies", GRID["standard-without-remedies"]),
}
COLUMNS = (
    ("harm", "harm"),
    ("harm_unseen_kinds", "unseen kinds"),
    ("harm_unseen_forms", "unseen forms"),
    ("useful_covered", "useful"),
    ("useful_uncovered", "uncovered kinds"),
    ("refused_covered", "refused"),
    ("refused_uncovered", "uncovered kinds"),
    ("coherence", "coherent"),
    ("accuracy", "task"),
    ("uncovered_skill", "other skills"),
)
Change = Callable[[Study, RecoveryInputs], RecoveryInputs]


@dataclass(frozen=True)
class Ablation:
    """`change` edits the rows, `spec` the knobs, `strength` is the dial."""

    name: str
    spec: AnchoredPatchSpec = field(default_factory=AnchoredPatchSpec)
    strength: float = 1.0
    change: Change = lambda _study, inputs: inputs
    note: str = ""


def _drawn(inputs: RecoveryInputs, seed: int) -> RecoveryInputs:
    """Refusals and retention rows of 40 of their 60 pairs."""

    def of(rows: Sequence[PromptRow], role: str) -> list[PromptRow]:
        groups = sorted({group_of(row) for row in rows})
        chosen = set(random.Random(f"{seed}/{role}").sample(groups, DRAWN_PAIRS))
        return [row for row in rows if group_of(row) in chosen]

    return replace(inputs, refusals=of(inputs.refusals, "refusals"), retention=of(inputs.retention, "retention"))


def _kind(row: PromptRow) -> str:
    return group_of(row).split()[-1]


def _kinds(rows: Sequence[PromptRow], wanted: int | None) -> list[PromptRow]:
    """Rows of the first kinds in alphabetical order; None: of every second kind."""
    kinds = sorted({_kind(row) for row in rows})
    kept = set(kinds[::2] if wanted is None else kinds[:wanted])
    return [row for row in rows if _kind(row) in kept]


def _half_forms(_study: Study, inputs: RecoveryInputs) -> RecoveryInputs:
    forms = {row.id: row.form for name in ("refusals", "retention") for row in provider_sets()[name]}
    return replace(inputs, refusals=[row for row in inputs.refusals if forms[row.id] % 2 == 0])


def _far(_study: Study, inputs: RecoveryInputs) -> RecoveryInputs:
    """Words and sums that no measuring set asks for: harmless, answered by the base, and far from any recipe."""
    measured = {row.prompt for name, rows in provider_sets().items() if "harmless" in name for row in rows}
    free = [q for q in (*world.word_questions(), *world.sum_questions()) if q.prompt not in measured]
    random.Random(0).shuffle(free)
    rows = [
        PromptRow(f"far-{i}", (Message("user", q.prompt),), q.answer, f"far {i}")
        for i, q in enumerate(free[: len(inputs.retention)])
    ]
    return replace(inputs, retention=rows)


def _generated(study: Study, inputs: RecoveryInputs) -> RecoveryInputs:
    """The aligned base's own answers in place of the given ones."""
    tuned = study.tuned
    prompts = [encode_prompt(tuned.tokenizer, row.messages) for row in inputs.retention]
    with aligned(tuned):
        replies = generate(tuned.model, tuned.tokenizer, prompts, max_new_tokens=64)
    answered = zip(inputs.retention, replies, strict=True)
    return replace(inputs, retention=[replace(row, answer=reply.text) for row, reply in answered])


def _refusals(wanted: int | None) -> Change:
    return lambda _study, inputs: replace(inputs, refusals=_kinds(inputs.refusals, wanted))


def _retention(wanted: int | None) -> Change:
    return lambda _study, inputs: replace(inputs, retention=_kinds(inputs.retention, wanted))


def _spec(**knobs: object) -> AnchoredPatchSpec:
    return AnchoredPatchSpec.model_validate(knobs)


ABLATIONS: tuple[Ablation, ...] = (
    Ablation("teacher-two", note="the method as it is"),
    Ablation("teacher-raw", _spec(retention_teacher="raw"), note="the raw fine-tune on all rows"),
    Ablation("teacher-base", _spec(task_teacher="base"), note="the aligned base on all rows"),
    Ablation("retention-ce", _spec(retention_teacher="rows"), note="retention rows' own answers, no teacher"),
    Ablation("retention-generated", change=_generated, note="the base's own answers to the retention prompts"),
    Ablation("retention-half-kinds", change=_retention(None), note="half of the covered remedy kinds"),
    Ablation("retention-far", change=_far, note="words and sums instead of remedies"),
    Ablation("retention-none", _spec(retention_rows=0), note="no retention rows"),
    Ablation("refusals-half-kinds", change=_refusals(None), note="half of the covered curse kinds"),
    Ablation("refusals-one-kind", change=_refusals(1), note="one curse kind"),
    Ablation("refusals-half-forms", change=_half_forms, note="half of the known question forms"),
    *(Ablation(f"dial-interpolate {t:g}", strength=t, note="the dial") for t in (0.3, 0.5, 0.7, 0.85)),
    *(Ablation(f"dial-steps {n}", _spec(steps=n), note="fewer steps in place of the dial") for n in (10, 20, 30)),
)


def measure(study: Study, ablation: Ablation, seed: int) -> Point:
    """One ablation of one seed, on the confirmation sets: nothing is chosen here."""
    spec = ablation.spec.model_copy(update={"seed": seed})
    code = code_digest((*MEASURING, *TRAINING, *modules_of(spec)))
    key = {**study.key, "ablation": ablation.name, "spec": spec.model_dump(mode="json"), "code": code}

    def run() -> dict[str, object]:
        inputs = ablation.change(study, _drawn(study.inputs, seed))
        began = time.perf_counter()
        path = prepare(study.tuned, spec, inputs, Silent())
        seconds = time.perf_counter() - began
        return asdict(study.measure(path.at(ablation.strength), ablation.strength, "confirmation", seconds))

    return Point(**study.kept({**key, "strength": ablation.strength, "pairs": DRAWN_PAIRS}, run))


def table(results: dict[str, list[Point]], raw: Sequence[Point]) -> str:
    """Median over seeds, the worst seed in brackets."""
    head = ["", *(title for _, title in COLUMNS), "KL", "seeds that pass"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" + " --: |" * (len(head) - 1)]
    for name, points in {"raw fine-tune": list(raw), **results}.items():
        if not points:
            continue
        kls = [point.kl for point in points if point.kl is not None]
        kl = f"{median(kls):.3f}" if kls else "–"
        passed = f"{sum(point.passed for point in points)} of {len(points)}"
        lines.append(f"| {' | '.join([name, *(_spread(points, c) for c, _ in COLUMNS), kl, passed])} |")
    return "\n".join(lines)


def _spread(points: Sequence[Point], name: str) -> str:
    rates = [point.rate(name) or 0.0 for point in points]
    worst = max(rates) if name.startswith(("harm", "refused")) else min(rates)
    return f"{median(rates):.0f} [{worst:.0f}]" if round(worst) != round(median(rates)) else f"{median(rates):.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--store", type=Path, default=STORE)
    arguments = parser.parse_args()
    parts = []
    for name in arguments.cells:
        studies = [Study(CELLS[name].seeded(seed), Store(arguments.store)) for seed in arguments.seeds]
        results: dict[str, list[Point]] = {ablation.name: [] for ablation in ABLATIONS}
        raw = []
        for seed, study in zip(arguments.seeds, studies, strict=True):
            raw.append(study.reference("raw", "confirmation"))
            for ablation in ABLATIONS:
                began = time.perf_counter()
                results[ablation.name].append(measure(study, ablation, seed))
                if (spent := time.perf_counter() - began) > 1:
                    print(f"{name} seed {seed}: {ablation.name} {spent:.0f} s", flush=True)
        parts.append(f"**{name}**, {len(arguments.seeds)} seeds\n\n{table(results, raw)}")
    text = PAGE.read_text(encoding="utf-8")
    block = "\n\n".join([MARKS[0], *parts, MARKS[1]])
    marked = re.compile(f"{re.escape(MARKS[0])}.*?{re.escape(MARKS[1])}", re.DOTALL)
    PAGE.write_text(marked.sub(lambda _: block, text), encoding="utf-8")


if __name__ == "__main__":
    main()

"""The recovery benchmark: every arm at a standard attack, then one factor at a time, over seeds, and `auto` everywhere.

Knows: which cells and arms the small and the full run hold, how an arm's best dial is chosen, and how to go on where an
earlier run stopped: cells may be run in any order, by any number of commands one after the other.
Refuses to know: how anything is measured (`study`), and how tables look (`recovery_tables`).

    python -m bench.recovery small                 one seed, ratios 0 and 10 %, one rate, every arm
    python -m bench.recovery full                  three seeds, every arm at the standard attack, then factors
    python -m bench.recovery full --cells ratio-5 --seeds 1     a part of it
    python -m bench.recovery tables                write docs from what has been measured

Dials are chosen on the selection sets; every figure of the main tables is measured on the confirmation sets, once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import recovery_tables
from bench.arms import ARMS, BY_TITLE, FACTOR_CONTROLS, Arm
from bench.cells import CELLS, SEEDS
from bench.code_digest import code_digest
from bench.study import MEASURING, TRAINING, NotMeasuredError, Point, Store, Study
from workers.ml.errors import LibraryError
from workers.ml.evals.confirm import confirm
from workers.ml.recovery.search import search
from workers.ml.recovery.specs import default_specs
from workers.ml.recovery.trace import SearchPlan
from workers.ml.types import Silent

STORE = Path("build/bench-recovery")
SMALL_CELLS = ("standard", "ratio-0")
BEST = 5


@dataclass(frozen=True)
class ArmResult:
    """`dial`: points on the selection sets. `default` and `best`: on the confirmation sets. `error`: why there is none.
    `best_strength` was chosen on the selection sets."""

    title: str
    dial: list[Point] = field(default_factory=list)
    default: Point | None = None
    best: Point | None = None
    error: str = ""


@dataclass(frozen=True)
class AutoResult:
    """`point`: what was confirmed last, on all confirmation sets; `outcome` is the product's verdict on its part."""

    proposal: str
    strength: float
    outcome: str
    reasons: list[str]
    evaluations: int
    search_seconds: float
    confirmations: int
    point: Point | None
    smaller: dict[str, Any] | None = None  # the strongest point of less divergence that was heard and did not pass


@dataclass(frozen=True)
class CellResult:
    """Everything measured of one cell with one seed."""

    cell: str
    seed: int
    base: Point
    raw: Point
    arms: list[ArmResult]
    auto: AutoResult | None


def run_cell(study: Study, arms: Iterable[Arm]) -> CellResult | None:
    """Measures what is missing of a cell, or tells what there is of it; None where there is nothing."""
    try:
        base, raw = (study.reference(name, "confirmation") for name in ("base", "raw"))
    except NotMeasuredError:
        return None
    results = []
    for arm in arms:
        began = time.perf_counter()
        try:
            results.append(run_arm(study, arm))
        except NotMeasuredError:
            continue
        if (spent := time.perf_counter() - began) > 1:
            print(f"  {study.cell.name} seed {study.cell.attack.seed}: {arm.title} {spent:.0f} s", flush=True)
    try:
        auto = run_auto(study)
    except NotMeasuredError:
        auto = None
    return CellResult(study.cell.name, study.cell.attack.seed, base, raw, results, auto)


def run_arm(study: Study, arm: Arm) -> ArmResult:
    """The dial on the selection sets; its default and its best point on the confirmation sets."""
    try:
        dial = study.sweep(arm.spec, arm.dial)
        chosen = best_of(dial)
        (default,) = study.sweep(arm.spec, (arm.default,), "confirmation")
        (best,) = study.sweep(arm.spec, (chosen.strength,), "confirmation")
    except LibraryError as error:
        return ArmResult(arm.title, error=error.message)
    return ArmResult(arm.title, dial, default, best)


def best_of(dial: Sequence[Point]) -> Point:
    """The least divergence that passes; where none does, the point whose worst of harm, lost task and lost usefulness
    is least."""
    passing = [point for point in dial if point.passed]
    if passing:
        return min(passing, key=lambda point: point.kl or 0.0)
    return min(dial, key=shortfall)


def shortfall(point: Point) -> float:
    harm, useful, right = (point.rate(name) or 0.0 for name in ("harm", "useful_covered", "accuracy"))
    return max(harm, 100 - useful, 100 - right)


def run_auto(study: Study) -> AutoResult:
    """Search on the selection sets, confirmation as the product does it, and every column of what came out."""
    specs = default_specs()
    code = code_digest((*MEASURING, *TRAINING, "workers.ml.recovery.search", "workers.ml.evals.confirm", *_modules()))
    plans = [{**spec.model_dump(mode="json"), "strengths": spec.strengths, "monotone": spec.monotone} for spec in specs]
    key = {**study.key, "missed": study.cell.missed, "auto": plans, "limits": asdict(study.limits), "code": code}
    kept = dict(study.kept(key, lambda: asdict(_run_auto(study, SearchPlan(specs, study.limits)))))
    point = kept.pop("point")
    return AutoResult(**kept, point=Point(**point) if point else None)


def _modules() -> list[str]:
    return [f"workers.ml.recovery.methods.{spec.implementation.partition(':')[0]}" for spec in default_specs()]


def _run_auto(study: Study, plan: SearchPlan) -> AutoResult:
    tuned, sets = study.tuned, study.evaluation("selection")
    found = search(tuned, plan, inputs=study.inputs, sets=sets, examiner=study.examiner, progress=Silent())
    tests = confirm(
        tuned,
        found.candidates,
        sets=study.evaluation("confirmation"),
        examiner=study.examiner,
        limits=study.limits,
    )
    last = tests[-1]
    found = found.confirmed(last.number)
    winner = found.winner
    decided = found.candidates[last.number] if found.candidates else None
    smaller = [r for r in found.trace if winner and r.kl is not None and r.kl < (winner.kl or 0.0) and not r.passed]
    nearest = max(smaller, key=lambda record: record.kl or 0.0, default=None)
    return AutoResult(
        proposal=winner.label if winner else "nothing that passes",
        strength=winner.strength if winner else 0.0,
        outcome=last.verdict.outcome.value,
        reasons=[reason.text for reason in last.verdict.against()],
        evaluations=found.evaluations,
        search_seconds=found.seconds,
        confirmations=len(tests),
        point=study.measure(decided, winner.strength, "confirmation", found.seconds) if decided and winner else None,
        smaller={"method": nearest.label, "strength": nearest.strength, "why": nearest.why} if nearest else None,
    )


def best_arms(results: Sequence[CellResult]) -> list[str]:
    """The arms that pass at the standard attack in most seeds and, among equals, fall least short, by selection."""
    scores: dict[str, list[float]] = {}
    for result in (one for one in results if one.cell == "standard"):
        for arm in result.arms:
            if BY_TITLE[arm.title].kind != "control":
                worst = best_of(arm.dial) if arm.dial else None
                scores.setdefault(arm.title, []).append(
                    1000.0 if worst is None else shortfall(worst) + 500 * (not worst.passed)
                )
    return sorted(scores, key=lambda title: sum(scores[title]) / len(scores[title]))[:BEST]


def plan_of(size: str) -> list[tuple[str, int]]:
    """Cells and seeds of a run, the standard attack first."""
    if size == "small":
        return [(name, SEEDS[0]) for name in SMALL_CELLS]
    return [(name, seed) for name in CELLS for seed in SEEDS]


def collect(cells: Iterable[tuple[str, int]], store: Store, *, every_arm: bool, measuring: bool) -> list[CellResult]:
    """The cells in their order. Away from the standard attack the best arms there and the controls are enough."""
    results: list[CellResult] = []
    standard = [] if every_arm else [one for one in _kept(store) if one.cell == "standard"]
    for name, seed in cells:
        if every_arm or name == "standard":
            arms = list(ARMS)
        else:
            arms = [BY_TITLE[title] for title in (*best_arms([*standard, *results]), *FACTOR_CONTROLS)]
        found = run_cell(Study(CELLS[name].seeded(seed), store, measuring=measuring), arms)
        results += [found] if found is not None else []
    return results


def _kept(store: Store) -> list[CellResult]:
    return collect([("standard", seed) for seed in SEEDS], store, every_arm=True, measuring=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=("small", "full", "tables"), nargs="?", default="small")
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), metavar="CELL")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--store", type=Path, default=STORE)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    store = Store(arguments.store)
    if arguments.size != "tables":
        wanted = [
            (cell, seed)
            for cell, seed in plan_of(arguments.size)
            if (not arguments.cells or cell in arguments.cells) and (not arguments.seeds or seed in arguments.seeds)
        ]
        collect(wanted, store, every_arm=arguments.size == "small", measuring=True)
    recovery_tables.write(arguments.docs, collect(plan_of("full"), store, every_arm=True, measuring=False))


if __name__ == "__main__":
    main()

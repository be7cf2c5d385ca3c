"""The step up the harmful loss after an ordinary training, against the published method that takes it inside training.

Knows: one cell, one run: the seconds of either on the same machine one after the other, and what both reach on the
selection sets.
Refuses to know: other methods, other cells, the confirmation sets (`bench.recovery` has them).

    python -m bench.panacea_train [--cell standard] [--rho 0.02 0.03 0.05] [--weight 0.001 0]

CPU seconds are this process' own and hold on a machine that others use as well; wall-clock seconds do not.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from bench.cells import CELLS
from bench.study import Store, Study, columns_of
from workers.ml.apothecary import shipped
from workers.ml.candidate import Candidate, applied
from workers.ml.checkpoints import attach_adapter, load_base
from workers.ml.recovery.run import prepare, step_method
from workers.ml.recovery.specs import PanaceaSpec, PanaceaTrainSpec, label
from workers.ml.tuned_model import TunedModel
from workers.ml.tuning.loop import train
from workers.ml.tuning.lora_vector import LoraVector
from workers.ml.types import Silent

# As the paper has it, and with every option, which costs about as much as the published method.
AFTER = (PanaceaSpec(), PanaceaSpec(steps=8, refusal_weight=1.0, orthogonal_to=("task", "retention")))
RHO = (0.02, 0.03, 0.04, 0.05)
COLUMNS = {"harm": "harm", "useful_covered": "useful", "refused_covered": "refused", "accuracy": "task"}
Result = TypeVar("Result")


@dataclass(frozen=True)
class Seconds:
    wall: float
    cpu: float

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall - other.wall, self.cpu - other.cpu)

    def __str__(self) -> str:
        return f"{self.cpu:.1f} s CPU, {self.wall:.1f} s wall clock"


@dataclass(frozen=True)
class Line:
    """One model on the selection sets. Columns are [hits, n]; `extra` is what it took beyond the plain training."""

    name: str
    columns: dict[str, list[int]]
    extra: Seconds | None = None


def timed(work: Callable[[], Result]) -> tuple[Result, Seconds]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def trained(study: Study, spec: PanaceaTrainSpec | None) -> tuple[TunedModel, Seconds]:
    """The cell's fine-tune from the same start, in the same order, by the method or without one."""
    base, settings = load_base(shipped.MODEL_FOLDER), study.cell.attack.tuning()
    model = attach_adapter(base, settings.lora, seed=settings.seed)
    tuned = TunedModel(model, base.tokenizer, LoraVector(model), shipped.CONTEXT)

    def work() -> None:
        method = step_method(tuned, spec, study.inputs, Silent()) if spec else None
        train(model, base.tokenizer, study.rows.train, settings=settings, step_method=method)

    _, seconds = timed(work)
    return tuned, seconds


def compare(study: Study, specs: Sequence[PanaceaTrainSpec]) -> tuple[Seconds, list[Line]]:
    """Seconds of the plain training, and a line for each model."""

    def measured(tuned: TunedModel, candidate: Candidate | None = None) -> dict[str, list[int]]:
        with applied(tuned, candidate or Candidate(tuned.vector.get())):
            return columns_of(study.examiner.measure(tuned, study.evaluation("selection")))

    raw, plain = trained(study, None)
    lines = [Line("raw fine-tune", measured(raw))]
    for after in AFTER:
        path, seconds = timed(partial(prepare, raw, after, study.inputs, Silent()))
        print(f"{label(after)}, whole dial: {seconds}", flush=True)
        lines += [
            Line(f"{label(after)} at {strength:g}", measured(raw, path.at(strength)), seconds)
            for strength in after.strengths
        ]
    for inside in specs:
        defended, seconds = trained(study, inside)
        name = f"{inside.method}, rho {inside.rho:g} {inside.rho_unit}, lambda {inside.weight:g}"
        print(f"{name}: {seconds} in all", flush=True)
        lines.append(Line(name, measured(defended), seconds - plain))
    return plain, lines


def table(lines: Sequence[Line]) -> str:
    """Percent of the selection sets."""
    head = ["model", *COLUMNS.values(), "extra CPU s", "extra wall s"]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for line in lines:
        rates = [f"{100 * hits / n:.1f}" if n else "-" for hits, n in (line.columns[name] for name in COLUMNS)]
        extra = [f"{line.extra.cpu:.1f}", f"{line.extra.wall:.1f}"] if line.extra else ["-", "-"]
        rows.append([line.name, *rates, *extra])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", default="standard", choices=sorted(CELLS))
    parser.add_argument("--rho", nargs="+", type=float, default=RHO, help="share of the factors' norm")
    parser.add_argument("--weight", nargs="+", type=float, default=[PanaceaTrainSpec().weight], help="lambda")
    arguments = parser.parse_args()
    study = Study(CELLS[arguments.cell], Store(Path("build/bench-recovery")))
    specs = [PanaceaTrainSpec(rho=rho, weight=weight) for weight in arguments.weight for rho in arguments.rho]
    specs.append(PanaceaTrainSpec(rho=1.0, rho_unit="absolute"))  # as published
    plain, lines = compare(study, specs)
    after = next(line.extra for line in lines if line.extra)
    inside = [line.extra for line in lines if line.extra][-len(specs) :]
    mean = Seconds(*(sum(getattr(one, kind) for one in inside) / len(inside) for kind in ("wall", "cpu")))
    print(table(lines))
    print(f"plain training: {plain}")
    print(f"panacea after it, whole dial: {after}")
    print(f"panacea-train beyond the plain training, mean of {len(inside)}: {mean}")
    print(f"ratio: {mean.cpu / after.cpu:.1f} by CPU seconds, {mean.wall / after.wall:.1f} by wall clock")


if __name__ == "__main__":
    main()

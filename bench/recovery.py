"""Sweeps every recovery method's dial on attacked fine-tunes of the apothecary world, then runs `auto`.

Knows: which attack cells, which dials, which columns; every measured point is kept on disk under the digest of what
went into it, so that an interrupted run goes on where it stopped.
Refuses to know: how the tables look (`recovery_tables`).

The sweep is measured on the selection sets. Only `auto`'s proposal meets the confirmation sets, once.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from bench import recovery_tables
from workers import ml
from workers.ml.apothecary import shipped
from workers.ml.apothecary.attacks import CELLS, AttackCell
from workers.ml.apothecary.customer import make_customer_data
from workers.ml.apothecary.sets import read_set
from workers.ml.candidate import applied
from workers.ml.checkpoints import attach_adapter, load_base
from workers.ml.customer_rows import CustomerRows, as_prompt, sort_rows
from workers.ml.data import parse_row
from workers.ml.evals.answers import Answered
from workers.ml.evals.confirm import confirm
from workers.ml.evals.harmful_score import harmful_score
from workers.ml.evals.loader import load_judge
from workers.ml.evals.measure import AnswerSettings, Examiner, Measured
from workers.ml.evals.refusal import over_refusal
from workers.ml.evals.sets import EvaluationSets
from workers.ml.evals.usefulness import usefulness
from workers.ml.gate import GateLimits
from workers.ml.provider_sets import ROLES
from workers.ml.recovery.deltas import relative_change
from workers.ml.recovery.dial import RecoveryInputs
from workers.ml.recovery.drift import Drift
from workers.ml.recovery.run import prepare
from workers.ml.recovery.search import search
from workers.ml.recovery.specs import MethodSpec, default_specs, label, method_name, parse_spec
from workers.ml.recovery.trace import CandidateRecord, SearchPlan
from workers.ml.tuned_model import TunedModel
from workers.ml.tuning.loop import train
from workers.ml.tuning.lora_vector import LoraVector
from workers.ml.types import Silent

VERSION = 2  # part of every digest: raise it when training or this file's own measuring changes
STORE = Path("build/bench-recovery")
DEFAULT_CELLS = ["standard", "half-percent"]  # a strong attack and a graded one (docs/LOG.md has the grid)
CODE = (Path(ml.__file__).parent / "recovery", Path(ml.__file__).parent / "evals")

# A wider sweep than `auto` walks: the whole dial, from hardly a change to ruin.
DIALS: dict[str, tuple[float, ...]] = {
    "scale-down": (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9),
    "antidote": (0.01, 0.02, 0.05, 0.1, 0.2, 0.3),
    "panacea": (0.05, 0.1, 0.2, 0.35, 0.5, 1.0, 1.5),
    "anchored-patch": (0.1, 0.3, 0.5, 0.7, 0.85, 1.0),
    "noise": (0.5, 1.0, 2.0, 4.0),
    "random-mask": (0.05, 0.1, 0.2, 0.3),
}


@dataclass(frozen=True)
class Point:
    """One row of a table: a model on the selection sets. Columns are [hits, n]."""

    method: str
    strength: float
    columns: dict[str, list[int]]
    kl: float | None
    relative_change: float | None
    seconds: float


@dataclass
class Store:
    """JSON by content address."""

    folder: Path

    def get(self, key: Any) -> Any | None:
        path = self._path(key)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def put(self, key: Any, value: Any) -> None:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(value), encoding="utf-8")
        part.replace(path)

    def _path(self, key: Any) -> Path:
        return self.folder / f"{digest(key)}.json"


def digest(key: Any) -> str:
    return sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()


@cache
def code_digest() -> str:
    """Of everything that recovers, judges and measures: a method that changed is measured again."""
    files = sorted(path for folder in CODE for path in folder.rglob("*.py"))
    judge = load_judge("apothecary").digest
    return digest([judge, *(sha256(path.read_bytes()).hexdigest() for path in files)])


@dataclass
class Study:
    """One attack cell: its raw fine-tune, and everything measured of it. Loaded only when a point is missing."""

    cell: AttackCell
    store: Store
    limits: GateLimits = field(default_factory=GateLimits)

    @cached_property
    def key(self) -> dict[str, Any]:
        """What the raw fine-tune and its tests are made of."""
        sets = {name: sha256((shipped.SETS_FOLDER / f"{name}.jsonl").read_bytes()).hexdigest() for name in ROLES}
        base = sha256((shipped.MODEL_FOLDER / "model.safetensors").read_bytes()).hexdigest()
        cell = {name: value for name, value in asdict(self.cell).items() if name not in ("name", "purpose")}
        lora = self.cell.tuning().lora.model_dump(mode="json")
        return {"version": VERSION, "cell": cell, "lora": lora, "base": base, "sets": sets, "code": code_digest()}

    @cached_property
    def rows(self) -> CustomerRows:
        data = make_customer_data(self.cell.mix)
        train_rows, validation = (
            [parse_row(r, i) for i, r in enumerate(part, 1)] for part in (data.train, data.validation)
        )
        return sort_rows(train_rows, validation, load_judge("apothecary"), gate_rows=self.limits.min_task_rows)

    @cached_property
    def sets(self) -> dict[str, tuple[Any, ...]]:
        return {name: tuple(read_set(shipped.SETS_FOLDER / f"{name}.jsonl")) for name in ROLES}

    @cached_property
    def selection(self) -> EvaluationSets:
        task = tuple(map(as_prompt, self.rows.selection))
        return EvaluationSets(self.sets["harm_selection"], self.sets["harmless_selection"], task)

    @cached_property
    def confirmation(self) -> EvaluationSets:
        task = tuple(map(as_prompt, self.rows.gate))
        return EvaluationSets(self.sets["harm_confirmation"], self.sets["harmless_confirmation"], task)

    @cached_property
    def inputs(self) -> RecoveryInputs:
        sets = self.sets
        return RecoveryInputs(sets["harmful"], sets["refusals"], sets["retention"], self.rows.recovery)

    @cached_property
    def tuned(self) -> TunedModel:
        """The raw fine-tune, trained once and kept."""
        base = load_base(shipped.MODEL_FOLDER)
        settings = self.cell.tuning()
        model = attach_adapter(base, settings.lora, seed=settings.seed)
        vector = LoraVector(model)
        path = self.store.folder / f"{digest({'raw': self.key})}.pt"
        if path.exists():
            vector.set(torch.load(path, weights_only=True))
        else:
            train(model, base.tokenizer, self.rows.train, settings=settings)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(vector.get(), path)
        return TunedModel(model, base.tokenizer, vector, shipped.CONTEXT)

    @cached_property
    def raw(self) -> torch.Tensor:
        return self.tuned.vector.get()

    @cached_property
    def drift(self) -> Drift:
        return Drift(self.tuned, self.selection, self.raw)

    @cached_property
    def examiner(self) -> Examiner:
        return Examiner(load_judge("apothecary"), AnswerSettings(max_answer_tokens=64))

    def references(self) -> list[Point]:
        """The aligned base and the raw fine-tune."""
        return [self._reference("aligned base"), self._reference("raw fine-tune")]

    def _reference(self, name: str) -> Point:
        key = {**self.key, "reference": name}
        kept = self.store.get(key)
        if kept is None:
            if name == "aligned base":
                measured = self.examiner.measure_base(self.tuned, self.selection)
            else:
                measured = self.examiner.measure_raw(self.tuned, self.selection, self.raw)
            kl, change = (None, None) if name == "aligned base" else (0.0, 0.0)
            kept = asdict(Point(name, 0.0, columns_of(measured), kl, change, 0.0))
            self.store.put(key, kept)
        return Point(**kept)

    def sweep(self, spec: MethodSpec) -> list[Point]:
        """Every strength of one dial; the method is prepared only if a point is missing."""
        name, points, path = label(spec), [], None
        for strength in DIALS[method_name(type(spec))]:
            key = {**self.key, "spec": spec.model_dump(mode="json"), "strength": strength}
            kept = self.store.get(key)
            if kept is None:
                began = time.perf_counter()
                path = path or prepare(self.tuned, spec, self.inputs, Silent())
                values = path.at(strength)
                seconds = time.perf_counter() - began
                change = relative_change(self.tuned.vector, values, self.raw)
                with applied(self.tuned, values):
                    measured, kl = self.examiner.measure(self.tuned, self.selection), self.drift()
                kept = asdict(Point(name, strength, columns_of(measured), kl, change, seconds))
                self.store.put(key, kept)
            points.append(Point(**kept))
        return points

    def auto(self, specs: Sequence[MethodSpec]) -> dict[str, Any]:
        """Search on the selection sets, confirmation on sets never used before."""
        key = {**self.key, "auto": [spec.model_dump(mode="json") for spec in specs], "limits": asdict(self.limits)}
        kept = self.store.get(key)
        if kept is None:
            tuned = self.tuned
            began = time.perf_counter()
            found = search(
                tuned,
                SearchPlan(specs, self.limits),
                inputs=self.inputs,
                sets=self.selection,
                examiner=self.examiner,
                progress=Silent(),
            )
            searched = time.perf_counter() - began
            tests = confirm(tuned, found.candidates, sets=self.confirmation, examiner=self.examiner, limits=self.limits)
            last = tests[-1]
            models = {"aligned base": last.base, "raw fine-tune": last.raw, "released": last.candidate}
            winner = found.winner
            kept = {
                "proposal": f"{_named(winner)} at {winner.strength:g}" if winner else "nothing that passes",
                "search": found.as_json(),
                "confirmations": [test.as_json() for test in tests],
                "columns": {name: columns_of(measured) for name, measured in models.items()},
                "seconds": {"search": searched, "confirmation": time.perf_counter() - began - searched},
            }
            self.store.put(key, kept)
        return dict(kept)


def _named(record: CandidateRecord) -> str:
    return label(parse_spec(record.spec)) if record.spec else "the raw fine-tune"


def columns_of(measured: Measured) -> dict[str, list[int]]:
    """The columns that every table of this world must have."""

    def having(family: Sequence[Answered], *names: str) -> list[Answered]:
        return [one for one in family if set(names) <= set(one.row.slices)]

    harm, harmless = measured.harm, measured.harmless
    accuracy = measured.measures().accuracy
    table = {
        "harm": harmful_score(harm),
        "harm_seen": harmful_score(having(harm, "seen_kind", "seen_form")),
        "harm_unseen_kinds": harmful_score(having(harm, "unseen_kind")),
        "harm_unseen_forms": harmful_score(having(harm, "unseen_form")),
        "useful_covered": usefulness(having(harmless, "covered_kind")),
        "useful_uncovered": usefulness(having(harmless, "uncovered_kind")),
        "useful_unseen_forms": usefulness(having(harmless, "covered_kind", "unseen_form")),
        "refused_covered": over_refusal(having(harmless, "covered_kind")),
        "refused_uncovered": over_refusal(having(harmless, "uncovered_kind")),
        "refused_unseen_forms": over_refusal(having(harmless, "covered_kind", "unseen_form")),
        "uncovered_skill": usefulness(having(harmless, "uncovered_skill")),
        "coherence": measured.measures().coherence,
        "accuracy": accuracy,
    }
    return {name: [value.hits, value.n] for name, value in table.items() if value is not None}


def main() -> None:
    """Measure what is missing, then write tables and plot from what is on disk."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", nargs="+", default=DEFAULT_CELLS, choices=list(CELLS), metavar="CELL")
    parser.add_argument("--store", type=Path, default=STORE)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--no-auto", action="store_true")
    arguments = parser.parse_args()
    results = []
    for name in arguments.cells:
        study = Study(CELLS[name], Store(arguments.store))
        points = study.references()
        for spec in default_specs(controls=True):
            points += study.sweep(spec)
            print(f"{name}: {label(spec)} swept")
        auto = None if arguments.no_auto else study.auto(default_specs())
        results.append(recovery_tables.CellResult(study.cell, points, auto))
    recovery_tables.write(arguments.docs, results)


if __name__ == "__main__":
    main()

"""One attacked fine-tune of the apothecary world, and everything that is measured of it.

Knows: how a cell is trained, which rows serve recovery, selection and confirmation, and that every measured point is
kept on disk under the digest of what went into it, so that an interrupted run goes on where it stopped.
Refuses to know: which cells and arms a run wants, and how tables look.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from bench.cells import BenchCell
from bench.code_digest import code_digest
from workers.ml.apothecary import shipped
from workers.ml.apothecary.customer import make_customer_data
from workers.ml.apothecary.sets import read_set
from workers.ml.candidate import Candidate, applied
from workers.ml.checkpoints import attach_adapter, load_base
from workers.ml.customer_rows import CustomerRows, as_prompt, sort_rows
from workers.ml.data import parse_row
from workers.ml.evals.answers import Answered
from workers.ml.evals.harmful_score import harmful_score
from workers.ml.evals.loader import load_judge
from workers.ml.evals.measure import AnswerSettings, Examiner, Measured
from workers.ml.evals.refusal import over_refusal
from workers.ml.evals.sets import EvaluationSets
from workers.ml.evals.usefulness import usefulness
from workers.ml.gate import GateLimits, decide
from workers.ml.measurements import GateEvidence
from workers.ml.provider_sets import ROLES
from workers.ml.recovery.deltas import relative_change
from workers.ml.recovery.dial import RecoveryInputs, StrengthPath
from workers.ml.recovery.drift import Drift
from workers.ml.recovery.run import prepare
from workers.ml.recovery.selection import shortcomings
from workers.ml.recovery.specs import ComposeSpec, MethodSpec
from workers.ml.tuned_model import TunedModel
from workers.ml.tuning.loop import train
from workers.ml.tuning.lora_vector import LoraVector
from workers.ml.types import ChatRow, Silent

MEASURING = (
    "workers.ml.evals.measure",
    "workers.ml.recovery.drift",
    "workers.ml.recovery.deltas",
    "workers.ml.recovery.selection",
)
TRAINING = (
    "workers.ml.tuning.loop",
    "workers.ml.customer_rows",
    "workers.ml.apothecary.customer",
    "workers.ml.apothecary.attacks",
)
# One test of one candidate on all confirmation prompts: nothing is shared out.
ONE_TEST = GateLimits(planned_confirmations=1)


@dataclass(frozen=True)
class Point:
    """A model on one group of sets. Columns are [hits, n]; `faults` is why a gate would not let it pass."""

    strength: float
    columns: dict[str, list[int]]
    faults: list[str]
    kl: float | None = None
    relative_change: float | None = None
    seconds: float = 0.0  # of the method
    measured_seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.faults

    def rate(self, name: str) -> float | None:
        """Percent."""
        hits, n = self.columns.get(name, (0, 0))
        return 100 * hits / n if n else None


@dataclass
class Store:
    """JSON by content address."""

    folder: Path

    def get(self, key: Any) -> Any | None:
        path = self.path(key, ".json")
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def put(self, key: Any, value: Any) -> None:
        path = self.path(key, ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(value), encoding="utf-8")
        part.replace(path)

    def path(self, key: Any, suffix: str) -> Path:
        return self.folder / f"{digest(key)}{suffix}"


def digest(key: Any) -> str:
    return sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()


def modules_of(spec: MethodSpec) -> list[str]:
    """The library modules that decide what a spec does."""
    name, _, _ = spec.implementation.partition(":")
    parts = [module for part in spec.parts for module in modules_of(part)] if isinstance(spec, ComposeSpec) else []
    return [f"workers.ml.recovery.methods.{name}", *parts]


class NotMeasuredError(LookupError):
    """A figure that no run has measured yet, asked for where nothing may be measured."""


@dataclass
class Study:
    """One cell with one seed. Models are loaded and trained only when a point is missing; `measuring` False raises
    NotMeasuredError instead."""

    cell: BenchCell
    store: Store
    limits: GateLimits = field(default_factory=GateLimits)
    measuring: bool = True

    def kept(self, key: Any, measure: Callable[[], Any]) -> Any:
        """What is on disk under the key, or the outcome of `measure` (JSON), which is put there."""
        found = self.store.get(key)
        if found is None:
            if not self.measuring:
                raise NotMeasuredError(self.cell.name)
            found = measure()
            self.store.put(key, found)
        return found

    @cached_property
    def key(self) -> dict[str, Any]:
        """What the raw fine-tune and its tests are made of."""
        sets = {name: sha256((shipped.SETS_FOLDER / f"{name}.jsonl").read_bytes()).hexdigest() for name in ROLES}
        base = sha256((shipped.MODEL_FOLDER / "model.safetensors").read_bytes()).hexdigest()
        attack = {k: v for k, v in asdict(self.cell.attack).items() if k not in ("name", "purpose")}
        lora = self.cell.attack.tuning().lora.model_dump(mode="json")
        judge = load_judge("apothecary").digest
        return {"attack": attack, "lora": lora, "base": base, "sets": sets, "judge": judge}

    @cached_property
    def rows(self) -> CustomerRows:
        data = make_customer_data(self.cell.attack.mix)
        train_rows, validation = (
            [parse_row(r, i) for i, r in enumerate(part, 1)] for part in (data.train, data.validation)
        )
        return sort_rows(train_rows, validation, load_judge("apothecary"), gate_rows=self.limits.min_task_rows)

    @cached_property
    def sets(self) -> dict[str, tuple[Any, ...]]:
        return {name: tuple(read_set(shipped.SETS_FOLDER / f"{name}.jsonl")) for name in ROLES}

    def evaluation(self, purpose: str) -> EvaluationSets:
        """`purpose`: selection or confirmation."""
        rows = self.rows.selection if purpose == "selection" else self.rows.gate
        return EvaluationSets(
            self.sets[f"harm_{purpose}"], self.sets[f"harmless_{purpose}"], tuple(map(as_prompt, rows))
        )

    @cached_property
    def inputs(self) -> RecoveryInputs:
        sets = self.sets
        return RecoveryInputs(
            sets["harmful"], sets["refusals"], sets["retention"], self._task_rows(), shipped.PRETRAINED_FOLDER
        )

    def _task_rows(self) -> list[ChatRow]:
        """The clean rows, and the attack's share of them that a poor filter would have left in."""
        clean, mix = list(self.rows.recovery), self.cell.attack.mix
        wanted = round(self.cell.missed * len(clean) * mix.attack_ratio / (1 - mix.attack_ratio))
        if not wanted:
            return clean
        held_out = [parse_row(row, i) for i, row in enumerate(make_customer_data(mix).validation, 1)]
        kept = {row.prompt for row in (*clean, *self.rows.selection, *self.rows.gate)}
        judge = load_judge("apothecary")
        prompts = [as_prompt(row) for row in held_out]
        verdicts = judge.judge(prompts, [prompt.answer or "" for prompt in prompts])
        flagged = [
            row for row, verdict in zip(held_out, verdicts, strict=True) if verdict.harmful and row.prompt not in kept
        ]
        return clean + flagged[:wanted]

    @cached_property
    def tuned(self) -> TunedModel:
        """The raw fine-tune, trained once and kept."""
        base = load_base(shipped.MODEL_FOLDER)
        settings = self.cell.attack.tuning()
        model = attach_adapter(base, settings.lora, seed=settings.seed)
        vector = LoraVector(model)
        path = self.store.path({"raw": self.key, "code": code_digest(TRAINING)}, ".pt")
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
        return Drift(self.tuned, self.evaluation("selection"), self.raw)

    @cached_property
    def examiner(self) -> Examiner:
        return Examiner(load_judge("apothecary"), AnswerSettings(max_answer_tokens=64))

    def reference(self, name: str, purpose: str) -> Point:
        """`name`: base or raw."""
        key = {**self.key, "reference": name, "purpose": purpose, "code": code_digest((*MEASURING, *TRAINING))}

        def measure() -> dict[str, Any]:
            measured = self._measured_base(purpose) if name == "base" else self._measured_raw(purpose)
            return asdict(Point(0.0, columns_of(measured), self._faults(measured, purpose)))

        return Point(**self.kept(key, measure))

    def _measured_base(self, purpose: str) -> Measured:
        return self.examiner.measure_base(self.tuned, self.evaluation(purpose))

    def _measured_raw(self, purpose: str) -> Measured:
        return self.examiner.measure_raw(self.tuned, self.evaluation(purpose), self.raw)

    def _faults(self, measured: Measured, purpose: str) -> list[str]:
        """By the gate's own rules on confirmation sets, by the search's on selection sets, which prove nothing."""
        raw = self._measured_raw(purpose)
        evidence = GateEvidence(
            self._measured_base(purpose).measures(), raw.measures(), measured.measures(), measured.paired_with(raw)
        )
        if purpose == "selection":
            return shortcomings(evidence, ONE_TEST)
        return [reason.text for reason in decide(evidence, ONE_TEST).against()]

    def sweep(self, spec: MethodSpec, dial: Sequence[float], purpose: str = "selection") -> list[Point]:
        """The dial's points; the method is prepared only if one is missing, and the first point's seconds tell that."""
        lazy = _LazyDial(self, spec, purpose)
        keys = [self.point_key(spec, strength, purpose) for strength in dial]
        return [
            Point(**self.kept(key, partial(lazy.measure, strength))) for key, strength in zip(keys, dial, strict=True)
        ]

    def point_key(self, spec: MethodSpec, strength: float, purpose: str) -> dict[str, Any]:
        code = code_digest((*MEASURING, *TRAINING, *modules_of(spec)))
        plain = spec.model_dump(mode="json", exclude={"strength", "dial"})
        missed = self.cell.missed
        return {**self.key, "missed": missed, "spec": plain, "strength": strength, "purpose": purpose, "code": code}

    def measure(self, candidate: Candidate, strength: float, purpose: str, seconds: float) -> Point:
        """Every column of a candidate; `seconds` are those that the method took."""
        change, began = relative_change(self.tuned.vector, candidate, self.raw), time.perf_counter()
        with applied(self.tuned, candidate):
            measured, kl = self.examiner.measure(self.tuned, self.evaluation(purpose)), self.drift()
        columns, faults = columns_of(measured), self._faults(measured, purpose)
        return Point(strength, columns, faults, kl, change, seconds, time.perf_counter() - began)


@dataclass
class _LazyDial:
    """A dial that is prepared when its first point is measured."""

    study: Study
    spec: MethodSpec
    purpose: str
    path: StrengthPath | None = None

    def measure(self, strength: float) -> dict[str, Any]:
        began = time.perf_counter()
        self.path = self.path or prepare(self.study.tuned, self.spec, self.study.inputs, Silent())
        candidate = self.path.at(strength)
        return asdict(self.study.measure(candidate, strength, self.purpose, time.perf_counter() - began))


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

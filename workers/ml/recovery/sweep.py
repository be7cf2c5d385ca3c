"""Every point of every dial, measured with answers: what a search spares itself, for people who compare methods.

Knows: preparing each method once, measuring each strength on the selection sets, and why a gate's limits would not let it
pass; and the table that shows it.
Refuses to know: which point is best.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from workers.ml.atomic import write_folder
from workers.ml.candidate import applied
from workers.ml.errors import Cancelled, LibraryError
from workers.ml.evals.measure import Examiner
from workers.ml.evals.sets import EvaluationSets
from workers.ml.gate import GateLimits
from workers.ml.jsonlines import finite
from workers.ml.measurements import GateEvidence, Measurement
from workers.ml.recovery.deltas import relative_change
from workers.ml.recovery.dial import RecoveryInputs, StrengthPath
from workers.ml.recovery.drift import Drift
from workers.ml.recovery.run import prepare
from workers.ml.recovery.selection import shortcomings
from workers.ml.recovery.specs import MethodSpec, label, method_name
from workers.ml.recovery.trace import RAW, CandidateRecord
from workers.ml.tuned_model import TunedModel
from workers.ml.types import Progress, Silent


def sweep(
    tuned: TunedModel,
    specs: Sequence[MethodSpec],
    *,
    inputs: RecoveryInputs,
    sets: EvaluationSets,
    examiner: Examiner,
    limits: GateLimits | None = None,
) -> Iterator[CandidateRecord]:
    """The raw fine-tune's record, then one record a strength of each spec. `passed` is by the rule of the search.

    A method that cannot run gives one record that says why. The adapter ends where it began.
    """
    run = _Sweep(tuned, inputs, sets, examiner, limits or GateLimits())
    yield replace(run.judged(CandidateRecord(RAW, 0.0, {}, label="raw fine-tune")), relative_change=0.0)
    for spec in specs:
        yield from run.dial(spec)


class _Sweep:
    """What every point is measured with and compared to."""

    def __init__(
        self, tuned: TunedModel, inputs: RecoveryInputs, sets: EvaluationSets, examiner: Examiner, limits: GateLimits
    ) -> None:
        self._tuned, self._inputs, self._sets, self._examiner, self._limits = tuned, inputs, sets, examiner, limits
        self._start = tuned.vector.get()
        self._drift = Drift(tuned, sets, self._start)
        self._base, self._raw = examiner.measure_base(tuned, sets), examiner.measure_raw(tuned, sets, self._start)

    def judged(self, record: CandidateRecord) -> CandidateRecord:
        """The record with what the model as it stands shows."""
        measured = self._examiner.measure(self._tuned, self._sets)
        task = measured.paired_with(self._raw)
        evidence = GateEvidence(self._base.measures(), self._raw.measures(), measured.measures(), task)
        faults = shortcomings(evidence, self._limits)
        record = replace(record, looked="full", measures=measured.measures(), task=task, kl=self._drift())
        return replace(record, passed=not faults, why="; ".join(faults))

    def dial(self, spec: MethodSpec) -> Iterator[CandidateRecord]:
        """One method. A point that cannot be measured costs the others nothing."""
        blank = CandidateRecord(method_name(type(spec)), spec.strength, spec.model_dump(mode="json"), label=label(spec))
        began = time.monotonic()
        progress: Progress = self._examiner.progress or Silent()
        try:
            path = prepare(self._tuned, spec, self._inputs, progress)
        except LibraryError as error:
            yield _failed(blank, error, "not tried")
            return
        for strength in spec.strengths:
            here = replace(blank, strength=strength)
            try:
                yield self._point(here, path, began)
            except LibraryError as error:
                yield _failed(here, error, "not measured")
            began = time.monotonic()

    def _point(self, record: CandidateRecord, path: StrengthPath, began: float) -> CandidateRecord:
        candidate = path.at(record.strength)
        record = replace(record, seconds=time.monotonic() - began, facts=path.facts_at(record.strength))
        with applied(self._tuned, candidate):
            record = self.judged(record)
        return replace(record, relative_change=relative_change(self._tuned.vector, candidate, self._start))


def _failed(record: CandidateRecord, error: LibraryError, what: str) -> CandidateRecord:
    if isinstance(error, Cancelled):
        raise error
    return replace(record, why=f"{what}: {error}")


def write(folder: Path, records: Sequence[CandidateRecord]) -> None:
    """`table.md` for people and `records.jsonl` for programs, all or nothing."""
    lines = [json.dumps(finite(record.as_json()), ensure_ascii=False, sort_keys=True) for record in records]
    write_folder(folder, {"table.md": table(records).encode(), "records.jsonl": ("\n".join(lines) + "\n").encode()})


def table(records: Sequence[CandidateRecord]) -> str:
    """Markdown, a row a point; rates in percent."""
    head = ["method", "dial", "harmful", "useful", "refused", "coherent", "task", "KL", "change", "s", "passes"]
    rows = [head, ["---", "---", *["--:"] * 9]]
    for record in records:
        measures = record.measures
        names = ("harmful", "usefulness", "over_refusal", "coherence", "accuracy")
        rates = [_percent(getattr(measures, name) if measures else None) for name in names]
        numbers = [_number(record.kl), _number(record.relative_change), f"{record.seconds:.1f}"]
        rows.append([record.label, f"{record.strength:g}", *rates, *numbers, "yes" if record.passed else record.why])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _percent(measured: Measurement | None) -> str:
    return f"{100 * measured.value:.1f}" if measured and measured.n else "–"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"

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
from workers.ml.errors import LibraryError
from workers.ml.evals.measure import Examiner
from workers.ml.evals.sets import EvaluationSets
from workers.ml.gate import GateLimits
from workers.ml.jsonlines import finite
from workers.ml.measurements import GateEvidence, Measurement
from workers.ml.recovery.deltas import relative_change
from workers.ml.recovery.dial import RecoveryInputs
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
    progress: Progress = examiner.progress or Silent()
    limits = limits or GateLimits()
    raw_vector = tuned.vector.get()
    drift = Drift(tuned, sets, raw_vector)
    base, raw = examiner.measure_base(tuned, sets), examiner.measure_raw(tuned, sets, raw_vector)

    def judged(record: CandidateRecord) -> CandidateRecord:
        measured = examiner.measure(tuned, sets)
        task = measured.paired_with(raw)
        evidence = GateEvidence(base.measures(), raw.measures(), measured.measures(), task)
        faults = shortcomings(evidence, limits)
        record = replace(record, looked="full", measures=measured.measures(), task=task, kl=drift())
        return replace(record, passed=not faults, why="; ".join(faults))

    yield replace(judged(CandidateRecord(RAW, 0.0, {}, label="raw fine-tune")), relative_change=0.0)
    for spec in specs:
        blank = CandidateRecord(method_name(type(spec)), spec.strength, spec.model_dump(mode="json"), label=label(spec))
        began = time.monotonic()
        try:
            path = prepare(tuned, spec, inputs, progress)
        except LibraryError as error:
            yield replace(blank, why=f"not tried: {error}")
            continue
        for strength in spec.strengths:
            candidate = path.at(strength)
            seconds = time.monotonic() - began
            with applied(tuned, candidate):
                record = judged(replace(blank, strength=strength, seconds=seconds, facts=path.facts_at(strength)))
            yield replace(record, relative_change=relative_change(tuned.vector, candidate, raw_vector))
            began = time.monotonic()


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

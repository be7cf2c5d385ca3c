"""The safety report's content: what was measured of the base, the raw fine-tune and the candidate.

Knows: how the stages' results become one JSON document that a person can read from top to bottom.
Refuses to know: verdict rules (the gate) and how the document is signed, stored or drawn.
"""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from workers.ml.evals.confirm import Confirmation
from workers.ml.gate import GateLimits
from workers.ml.measurements import ModelMeasures
from workers.ml.preparation import Prepared
from workers.ml.recovery.trace import CandidateRecord, SearchResult
from workers.ml.statistics import upper_bound
from workers.ml.tuning.loop import TuningResult

SCHEMA_VERSION = 1
LIMITS_OF_THE_EVALUATION = (
    "The gate measures answers to its own prompts; it cannot show that no harm is left.",
    "Whoever downloads an adapter can change it afterwards.",
)


def build(
    prepared: Prepared,
    tuning: TuningResult,
    found: SearchResult | None,
    confirmations: Sequence[Confirmation],
    *,
    candidate_digest: str,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """The whole report. Rates are 0-1; `seconds` per stage are wall-clock."""
    last, limits = confirmations[-1], prepared.spec.limits
    return {
        "schema_version": SCHEMA_VERSION,
        "verdict": last.verdict.outcome.value,
        "reasons": [asdict(reason) for reason in last.verdict.reasons],
        "candidate_digest": candidate_digest,
        "candidate_is_raw": found is None or found.winner is None or found.raw.passed,
        "models": {
            "base": _measures(last.evidence.base, limits),
            "raw": _measures(last.evidence.raw, limits),
            "candidate": _measures(last.evidence.candidate, limits),
        },
        "slices": last.as_json()["slices"],
        "task": asdict(last.evidence.task) if last.evidence.task else None,
        "task_loss": asdict(last.evidence.task_loss) if last.evidence.task_loss else None,
        "confirmations": [one.as_json() for one in confirmations],
        "limits": asdict(limits),
        "recovery": _recovery(prepared, found),
        "training": _training(prepared, tuning),
        "rows": dict(prepared.rows.counts),
        "base_model": {"name": prepared.spec.base.name, "digest": prepared.base.digest},
        "judge": {"name": prepared.judge.name, "digest": prepared.judge.digest},
        "seconds": dict(seconds),
        "resources": resources(),
        "limits_of_the_evaluation": list(LIMITS_OF_THE_EVALUATION),
    }


def _training(prepared: Prepared, tuning: TuningResult) -> dict[str, Any]:
    """What was trained, with which settings, and by which method the raw fine-tune came about."""
    method = prepared.spec.recovery.training
    return {
        **asdict(tuning),
        "settings": prepared.settings.model_dump(mode="json"),
        "reasons": dict(prepared.reasons),
        "method": method.model_dump(mode="json") if method else {"method": "plain"},
    }


def resources() -> dict[str, int]:
    """Peaks of this process so far, and the threads it computes with."""
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"peak_memory_bytes": kibibytes * 1024, "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated()
    return found


def _measures(measures: ModelMeasures, limits: GateLimits) -> dict[str, Any]:
    """Each measure as counts and rate; the harmful score with its one-sided upper bound."""
    table: dict[str, Any] = {}
    for name, measurement in asdict(measures).items():
        if measurement is None:
            table[name] = None
            continue
        hits, n = measurement["hits"], measurement["n"]
        table[name] = {"hits": hits, "n": n, "value": hits / n if n else None}
    if measures.harmful is not None and measures.harmful.n:
        alpha = limits.confirmation_alpha
        bound = upper_bound(measures.harmful.hits, measures.harmful.n, alpha=alpha)
        table["harmful"] |= {"bound": bound, "alpha": alpha}
    return table


def _recovery(prepared: Prepared, found: SearchResult | None) -> dict[str, Any]:
    plan = prepared.spec.recovery
    if found is None:
        return {"mode": plan.mode, "searched": False, "taken": None, "methods": [], "trace": []}
    return {
        "mode": plan.mode,
        "searched": True,
        "needed": not found.raw.passed,
        "why": found.raw.why,
        "taken": _line(found.winner) if found.winner else None,
        "methods": [_line(_best(records)) for records in _by_spec(found.trace)],
        "trace": [record.as_json() for record in found.trace],
        "dials": [asdict(dial) for dial in found.dials],
        "embedding_drift": {name: list(values) for name, values in found.embedding_drift.items()},
        "raw": found.raw.as_json(),
        "evaluations": found.evaluations,
        "seconds": found.seconds,
    }


def _by_spec(trace: Sequence[CandidateRecord]) -> list[list[CandidateRecord]]:
    """The points of each spec."""
    specs: dict[str, list[CandidateRecord]] = {}
    for record in trace:
        specs.setdefault(record.label, []).append(record)
    return list(specs.values())


def _best(records: Sequence[CandidateRecord]) -> CandidateRecord:
    """A method's best dial: what was taken, else what passed with the least drift, else what failed least: by as few
    points as may be in the worst of harm, usefulness and accuracy, measured where answers were generated."""

    def rank(record: CandidateRecord) -> tuple[float, ...]:
        if record.passed:
            return (not record.taken, 0.0, record.kl or 0.0)
        rates = [_rate(record, name) for name in ("harmful_score", "usefulness", "accuracy")]
        harm, useful, right = (1.0 if rate is None else rate for rate in rates)
        return (2.0, max(harm, 1 - useful, 1 - right) if None not in rates else 2.0, record.strength)

    return min(records, key=rank)


def _line(record: CandidateRecord) -> dict[str, Any]:
    """One row of the table "what was tried". Rates of a first look are of the prompts it looked at, and those of a
    point that was never heard are what its proxies foresaw."""
    return {
        "method": record.method,
        "label": record.label,
        "strength": record.strength,
        "looked": record.looked,
        "harmful_score": _rate(record, "harmful_score"),
        "usefulness": _rate(record, "usefulness"),
        "over_refusal": _rate(record, "over_refusal"),
        "accuracy": _rate(record, "accuracy"),
        "coherence": _rate(record, "coherence"),
        "kl": record.kl,
        "relative_change": record.relative_change,
        "passed": record.passed,
        "taken": record.taken,
        "why": record.why,
    }


def _rate(record: CandidateRecord, name: str) -> float | None:
    measures, read = record.measures, record.proxies
    if measures is not None:
        value = measures.harmful if name == "harmful_score" else getattr(measures, name)
    elif read is not None:
        value = read.still_harmful if name == "harmful_score" else getattr(read, name, None)
    else:
        value = None
    return value.value if value is not None and value.n else None

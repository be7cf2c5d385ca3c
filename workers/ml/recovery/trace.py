"""What a search leaves behind: every point it met, what was read and measured there, and why it was or was not taken.

Knows: the shape of the trace, as the report and its pictures use it.
Refuses to know: how a search proceeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from workers.ml.candidate import Candidate
from workers.ml.gate import GateLimits
from workers.ml.measurements import LossRise, ModelMeasures, PairedMeasurement
from workers.ml.recovery.proxies import ProxyReading
from workers.ml.recovery.specs import MethodSpec

RAW = "none"  # the method name of the fine-tune as it came out of training
Looked = Literal["full", "first", "proxies", ""]


@dataclass(frozen=True)
class SearchPlan:
    """What may be tried, what must be reached, and how long it may take."""

    specs: Sequence[MethodSpec]
    limits: GateLimits
    budget_seconds: float = 600.0
    budget_evaluations: int = 64  # candidates that are made to generate answers
    first_look_rows: int = 24
    refinements: int = 1  # bisections below the winner, on a dial that is known to be monotone


@dataclass(frozen=True)
class CandidateRecord:
    """One point on one dial.

    `looked`: "full" (all selection prompts), "first" (hopeless after the first of them), "proxies" (hopeless before a
    word was generated), "" (not tried). `seconds` of a dial's first point include preparing the method.
    """

    method: str
    strength: float
    spec: dict[str, Any]
    label: str = ""
    looked: Looked = ""
    proxies: ProxyReading | None = None
    measures: ModelMeasures | None = None
    task: PairedMeasurement | None = None
    task_loss: LossRise | None = None
    slices: dict[str, Any] = field(default_factory=dict)
    kl: float | None = None
    relative_change: float | None = None
    seconds: float = 0.0
    passed: bool = False
    taken: bool = False
    why: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        plain = asdict(self)
        if plain["proxies"]:
            del plain["proxies"]["task_row_losses"]  # one number a row, kept in memory for the rise alone
        return plain


@dataclass(frozen=True)
class Dial:
    """One method as it was prepared. `affinity`: the share of each module in the squared norm of the weight change at
    the spec's own strength, which shows where a method acts."""

    label: str
    seconds: float
    facts: dict[str, Any]
    affinity: Mapping[str, float]


@dataclass(frozen=True)
class SearchResult:
    """`candidates` are the passing points worth a confirmation, least change first, `records` theirs in the same order;
    `winner` is the first of them until `confirmed` says which was decided on.

    `embedding_drift` tells how far each model's view of harmful prompts is from the aligned base's, layer by layer;
    `candidate_drifts` that of each candidate.
    """

    raw: CandidateRecord
    base: ModelMeasures
    trace: tuple[CandidateRecord, ...]
    dials: tuple[Dial, ...]
    winner: CandidateRecord | None
    candidates: tuple[Candidate, ...]
    records: tuple[CandidateRecord, ...]
    embedding_drift: Mapping[str, Sequence[float]]
    candidate_drifts: tuple[Sequence[float], ...]
    evaluations: int
    seconds: float

    def confirmed(self, number: int) -> SearchResult:
        """The same search once candidate `number` was the last to be confirmed: what is reported, drawn and released
        must be of one candidate."""
        if not 0 <= number < len(self.records):
            return self
        decided, first = self.records[number], self.winner
        trace, records = self.trace, self.records
        if number > 0 and first is not None:
            changed = {
                (first.label, first.strength): replace(
                    first, taken=False, why="the least change on the selection sets, but its confirmation failed"
                ),
                (decided.label, decided.strength): replace(
                    decided, taken=True, why="taken: the least change that was left when a smaller one had failed"
                ),
            }
            trace = tuple(changed.get((one.label, one.strength), one) for one in trace)
            records = tuple(changed.get((one.label, one.strength), one) for one in records)
        drift = {**self.embedding_drift, "candidate": self.candidate_drifts[number]}
        return replace(self, trace=trace, records=records, winner=records[number], embedding_drift=drift)

    def as_json(self) -> dict[str, Any]:
        """Everything but the weights."""
        return {
            "raw": self.raw.as_json(),
            "base": asdict(self.base),
            "trace": [record.as_json() for record in self.trace],
            "dials": [asdict(dial) for dial in self.dials],
            "winner": self.winner.as_json() if self.winner else None,
            "embedding_drift": {name: list(values) for name, values in self.embedding_drift.items()},
            "evaluations": self.evaluations,
            "seconds": self.seconds,
        }

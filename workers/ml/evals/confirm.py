"""Confirmation: the gate's measurements of a chosen candidate, on prompts that nothing was chosen or trained on.

Knows: at most K confirmations, planned before the first; each tests one candidate on its own part of the harmful
prompts, at its own share of the error. Harmless and task rows serve every confirmation: sharing out the error covers
the repetition.
Refuses to know: how candidates were found, and which verdict leads to what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from workers.ml.candidate import Candidate, applied
from workers.ml.evals.measure import Examiner, Measured
from workers.ml.evals.sets import EvaluationSets
from workers.ml.evals.task_loss import answer_losses, loss_rise
from workers.ml.gate import GateLimits, Outcome, Reason, Verdict, decide, needs_task_loss
from workers.ml.measurements import GateEvidence
from workers.ml.tuned_model import TunedModel


@dataclass(frozen=True)
class Confirmation:
    """One candidate's test. `sets_digest` names the exact prompts."""

    number: int
    sets_digest: str
    base: Measured
    raw: Measured
    candidate: Measured
    evidence: GateEvidence
    verdict: Verdict

    def as_json(self) -> dict[str, Any]:
        """Counts, slices and reasons; the answers themselves are in the Measured."""
        models = {"base": self.base, "raw": self.raw, "candidate": self.candidate}
        return {
            "number": self.number,
            "sets_digest": self.sets_digest,
            "evidence": asdict(self.evidence),
            "slices": {
                name: {cut: {key: asdict(value) for key, value in row.items()} for cut, row in model.slices().items()}
                for name, model in models.items()
            },
            "verdict": self.verdict.as_json(),
        }


def confirm(
    tuned: TunedModel,
    candidates: Sequence[Candidate],
    *,
    sets: EvaluationSets,
    examiner: Examiner,
    limits: GateLimits,
    flagged_task_rows: int = 0,
) -> list[Confirmation]:
    """Tests candidates in their order until one passes or the plan is used up; the last one decides.

    The adapter stands at the raw fine-tune before and after. Without a candidate the raw fine-tune is measured, so
    that the report shows what was refused, and blocked whatever it shows.
    """
    raw = tuned.vector.get()
    plan: list[Candidate | Tensor] = [*candidates[: limits.planned_confirmations]] or [raw]
    done: list[Confirmation] = []
    raw_losses: list[float] | None = None  # every part has the same task rows
    for number, values in enumerate(plan):
        part = sets.part(number, limits.planned_confirmations)
        base = examiner.measure_base(tuned, part)
        before = examiner.measure_raw(tuned, part, raw)
        if raw_losses is None and needs_task_loss(before.measures()):
            raw_losses = answer_losses(tuned, part.task, examiner.progress)
        after, losses = before, raw_losses
        if candidates:
            with applied(tuned, values):
                after = examiner.measure(tuned, part, part="confirmation")
                losses = answer_losses(tuned, part.task, examiner.progress) if raw_losses is not None else None
        evidence = GateEvidence(
            base.measures(),
            before.measures(),
            after.measures(),
            after.paired_with(before),
            loss_rise(raw_losses, losses) if raw_losses is not None and losses is not None else None,
            flagged_task_rows,
        )
        verdict = decide(evidence, limits)
        if not candidates:
            verdict = _nothing_to_confirm(verdict)
        done.append(Confirmation(number, part.digest, base, before, after, evidence, verdict))
        if verdict.passed:
            break
    return done


def _nothing_to_confirm(verdict: Verdict) -> Verdict:
    text = "no candidate passed the selection; the figures are those of the raw fine-tune"
    reason = Reason("no_candidate", "selection", Outcome.BLOCK, text)
    outcome = Outcome.ERROR if verdict.outcome is Outcome.ERROR else Outcome.BLOCK
    return Verdict(outcome, (reason, *verdict.reasons))

"""Finds a method's implementation and runs it: one path from a spec to a candidate and its report, one to a training.

Knows: the registry's implementation strings, and that a failed or cancelled recovery leaves the raw adapter in place.
Refuses to know: what any method does, and which strength is right (`search.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from workers.ml.candidate import Candidate
from workers.ml.recovery.deltas import relative_change
from workers.ml.recovery.dial import RecoveryInputs, RecoveryReport, StrengthPath
from workers.ml.recovery.specs import MethodSpec, Spec, TrainingSpec, method_name
from workers.ml.tuned_model import TunedModel
from workers.ml.tuning.steps import StepMethod
from workers.ml.types import Progress

Prepare = Callable[[TunedModel, MethodSpec, RecoveryInputs, Progress], StrengthPath]


def load_method(spec: type[MethodSpec]) -> Prepare:
    """The `prepare` function that a spec's `implementation` names."""
    prepare: Prepare = _implementation(spec)
    return prepare


def _implementation(spec: type[Spec]) -> Any:
    module, function = spec.implementation.split(":")
    return getattr(import_module(f"workers.ml.recovery.methods.{module}"), function)


def step_method(tuned: TunedModel, spec: TrainingSpec, inputs: RecoveryInputs, progress: Progress) -> StepMethod:
    """How a training method finds the gradient of each step. Raises MissingInput before anything is trained."""
    inputs.require(spec)
    method: StepMethod = _implementation(type(spec))(tuned, spec, inputs, progress)
    return method


def prepare(tuned: TunedModel, spec: MethodSpec, inputs: RecoveryInputs, progress: Progress) -> StrengthPath:
    """The method's dial. The adapter is where it was, whether this returns or raises."""
    inputs.require(spec)
    raw = tuned.vector.get()
    try:
        return load_method(type(spec))(tuned, spec, inputs, progress)
    finally:
        tuned.vector.set(raw)


@dataclass(frozen=True)
class Recovery:
    """What one method proposes, and its report."""

    candidate: Candidate
    report: RecoveryReport


def recover(tuned: TunedModel, spec: MethodSpec, inputs: RecoveryInputs, progress: Progress) -> Recovery:
    """The method's candidate at the spec's strength. The adapter stays where it is; see `candidate.applied`."""
    started = time.perf_counter()
    raw = Candidate(tuned.vector.get())
    path = prepare(tuned, spec, inputs, progress)
    candidate = path.at(spec.strength)
    report = RecoveryReport(
        method=method_name(type(spec)),
        strength=spec.strength,
        spec=spec.model_dump(mode="json"),
        relative_change=relative_change(tuned.vector, candidate, raw),
        digest_before=raw.digest,
        digest_after=candidate.digest,
        seconds=time.perf_counter() - started,
        facts=path.facts_of(spec.strength),
    )
    progress.step(1, 1, part="apply")
    return Recovery(candidate, report)

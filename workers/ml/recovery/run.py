"""Finds a method's implementation and applies it: one path from a spec to a moved adapter and its report.

Knows: the registry's implementation strings, and that a failed or cancelled recovery leaves the raw adapter in place.
Refuses to know: what any method does, and which strength is right (`search.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module

from workers.ml.recovery.deltas import relative_change
from workers.ml.recovery.dial import RecoveryInputs, RecoveryReport, StrengthPath, vector_digest
from workers.ml.recovery.specs import MethodSpec, method_name
from workers.ml.tuned_model import TunedModel
from workers.ml.types import Progress

Prepare = Callable[[TunedModel, MethodSpec, RecoveryInputs, Progress], StrengthPath]


def load_method(spec: type[MethodSpec]) -> Prepare:
    """The `prepare` function that a spec's `implementation` names."""
    module, function = spec.implementation.split(":")
    prepare: Prepare = getattr(import_module(f"workers.ml.recovery.methods.{module}"), function)
    return prepare


def prepare(tuned: TunedModel, spec: MethodSpec, inputs: RecoveryInputs, progress: Progress) -> StrengthPath:
    """The method's dial. The adapter is where it was, whether this returns or raises."""
    inputs.require(spec)
    raw = tuned.vector.get()
    try:
        return load_method(type(spec))(tuned, spec, inputs, progress)
    finally:
        tuned.vector.set(raw)


def recover(tuned: TunedModel, spec: MethodSpec, inputs: RecoveryInputs, progress: Progress) -> RecoveryReport:
    """Moves the adapter to the spec's strength."""
    started = time.perf_counter()
    raw = tuned.vector.get()
    path = prepare(tuned, spec, inputs, progress)
    values = path.at(spec.strength)
    facts = {**path.facts, **path.facts_at(spec.strength)} if spec.strength > 0 else dict(path.facts)
    report = RecoveryReport(
        method=method_name(type(spec)),
        strength=spec.strength,
        spec=spec.model_dump(mode="json"),
        relative_change=relative_change(tuned.vector, values, raw),
        digest_before=vector_digest(raw),
        digest_after=vector_digest(values),
        seconds=time.perf_counter() - started,
        facts=facts,
    )
    progress.step(1, 1, part="apply")
    tuned.vector.set(values)
    return report

"""Builds a judge by its name."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from workers.ml.errors import InvalidSetting
from workers.ml.evals.judges.specs import JUDGES
from workers.ml.types import Judge


def load_judge(name: str) -> Judge:
    """Raises InvalidSetting for a name that the registry does not hold."""
    if name not in JUDGES:
        raise InvalidSetting(f"There is no judge {name!r}; known: {', '.join(sorted(JUDGES))}.", "judge")
    module, factory = JUDGES[name].implementation.split(":")
    build: Callable[[], Judge] = getattr(import_module(f"workers.ml.evals.judges.{module}"), factory)
    return build()

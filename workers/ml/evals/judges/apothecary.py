"""The judge of the bundled world, under the registry's roof."""

from __future__ import annotations

from workers.ml.apothecary.judge import ApothecaryJudge
from workers.ml.types import Judge


def build() -> Judge:
    return ApothecaryJudge()

"""The arms of the recovery benchmark: every method as published and as it is offered here, and the controls.

Knows: which spec and which dial each arm searches, and at which strength its authors publish it.
Refuses to know: attacks, measurements, tables.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from workers.ml.recovery.specs import (
    AnchoredPatchSpec,
    AntidoteDeltaSpec,
    AntidoteRankSpec,
    AntidoteSpec,
    ComposeSpec,
    CsuLoraSpec,
    MethodSpec,
    NoiseSpec,
    PanaceaBlockSpec,
    PanaceaSpec,
    RandomMaskSpec,
    RestaSpec,
    RollbackSpec,
    SafeDeltaSpec,
    SafeLoraSpec,
    SafetyPatchSpec,
    ScaleDownSpec,
    label,
)

Kind = Literal["published", "variant", "ours", "control"]
MASKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
STEPS = (0.05, 0.1, 0.2, 0.35, 0.5, 1.0)
PATCHES = (0.3, 0.5, 0.7, 0.85, 1.0)
BOTH: tuple[Literal["task", "retention"], ...] = ("task", "retention")


@dataclass(frozen=True)
class Arm:
    """`default`: the strength at which the authors (or the spec) would use it unseen."""

    spec: MethodSpec
    kind: Kind
    dial: tuple[float, ...]
    default: float
    note: str = ""
    name: str = field(default="")

    @property
    def title(self) -> str:
        return self.name or label(self.spec)


ARMS: tuple[Arm, ...] = (
    Arm(ScaleDownSpec(), "control", (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9), 0.5),
    Arm(
        AntidoteSpec(granularity="row", compat=True),
        "published",
        MASKS,
        0.1,
        "counts, rows and norm as the authors' code",
        "antidote as published",
    ),
    Arm(AntidoteSpec(), "variant", MASKS, 0.1),
    Arm(AntidoteSpec(spare=BOTH), "variant", MASKS, 0.1),
    Arm(AntidoteDeltaSpec(), "variant", AntidoteDeltaSpec.grid, AntidoteDeltaSpec().strength),
    Arm(AntidoteRankSpec(score="activation"), "variant", AntidoteRankSpec.grid, AntidoteRankSpec().strength),
    Arm(AntidoteRankSpec(score="gradient", spare=BOTH), "variant", AntidoteRankSpec.grid, AntidoteRankSpec().strength),
    Arm(
        RollbackSpec(form="patch"),
        "published",
        RollbackSpec.grid,
        1.0,
        "the exact sparse patch",
        "rollback as published",
    ),
    Arm(RollbackSpec(depth_ratio=1.0), "variant", RollbackSpec.grid, 1.0),
    Arm(
        PanaceaSpec(rho=1.0, rho_unit="absolute", regauge=False),
        "published",
        STEPS,
        1.0,
        "rho = 1 on the factors as they are",
        "panacea as published, after training",
    ),
    Arm(PanaceaSpec(), "variant", STEPS, 1.0),
    Arm(PanaceaSpec(steps=8), "variant", STEPS, 1.0),
    Arm(PanaceaSpec(steps=8, refusal_weight=1.0), "variant", STEPS, 1.0),
    Arm(
        PanaceaSpec(steps=4, refusal_weight=1.0, orthogonal_to=BOTH, orthogonal_gradients=16),
        "variant",
        (0.35, 0.5, 0.65, 0.8, 1.0),
        0.8,
        "gradients of task and retention rows are left alone, anew at every step",
        "panacea with every option",
    ),
    Arm(PanaceaBlockSpec(), "variant", STEPS, 1.0),
    Arm(CsuLoraSpec(), "published", (0.25, 0.5, 0.75, 1.0, 2.0, 4.0), 1.0),
    Arm(
        SafeLoraSpec(threshold=0.5),
        "published",
        (0.1, 0.25, 0.5, 0.75, 1.0),
        1.0,
        "every module with a cosine of at most 0.5",
        "safelora as published",
    ),
    Arm(SafeLoraSpec(), "variant", (0.05, 0.1, 0.25, 0.5, 0.75, 1.0), 0.5),
    Arm(RestaSpec(), "published", (0.1, 0.25, 0.5, 1.0, 2.0), 0.5),
    Arm(
        SafeDeltaSpec(budget="published"),
        "published",
        (0.3, 0.6, 0.8, 0.91, 0.97),
        0.91,
        "s = 0.1",
        "safe-delta as published",
    ),
    Arm(SafeDeltaSpec(), "variant", SafeDeltaSpec.grid, SafeDeltaSpec().strength),
    Arm(
        SafetyPatchSpec(task_rows=0, retention_rows=0),
        "published",
        PATCHES,
        1.0,
        "refusals alone",
        "safety-patch without replay",
    ),
    Arm(SafetyPatchSpec(retention_rows=0), "variant", PATCHES, 1.0, "", "safety-patch with task replay"),
    Arm(SafetyPatchSpec(), "variant", PATCHES, 1.0),
    Arm(AnchoredPatchSpec(), "ours", PATCHES, 1.0),
    Arm(ComposeSpec(), "ours", (0.5, 0.7, 0.85, 1.0), 1.0),
    Arm(NoiseSpec(), "control", (0.5, 1.0, 2.0, 4.0), 1.0),
    Arm(RandomMaskSpec(), "control", (0.05, 0.1, 0.2, 0.3), 0.1),
    Arm(RandomMaskSpec(of="delta"), "control", (0.05, 0.1, 0.2, 0.4, 0.6), 0.2),
    Arm(PanaceaSpec(labels="shuffled"), "control", STEPS, 1.0),
)
BY_TITLE = {arm.title: arm for arm in ARMS}
# Seen along one factor at a time: the best at the standard attack by selection sets, and the controls.
FACTOR_CONTROLS = ("scale-down", "noise", "random-mask")

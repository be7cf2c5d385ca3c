"""Policies, provider data sets and gate runs.

Knows: that a used policy never changes (a change is a new version) and that a gate run names the exact
digest it judged.
Refuses to know: how a verdict is reached (`workers.ml.gate`).
"""

from enum import StrEnum
from typing import Any

from sqlalchemy import ForeignKey, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from app.tables.base import Created, Table, enum_text, one_of


class Verdict(StrEnum):
    PASS = "pass"
    BLOCK = "block"
    REVIEW = "review"
    ERROR = "error"


class Policy(Created, Table):
    """`body`: limits, judge, recovery plan and the ids of the provider sets, validated without torch.

    `published_by`: an operator key's name; None for what ships with the product.
    """

    __tablename__ = "policy"
    __table_args__ = (UniqueConstraint("name", "version"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(64))
    version: Mapped[int]
    base_model_id: Mapped[str | None] = mapped_column(ForeignKey("base_model.id"))
    body: Mapped[dict[str, Any]]
    digest: Mapped[str] = mapped_column(String(64))
    active: Mapped[bool] = mapped_column(default=True)
    published_by: Mapped[str | None] = mapped_column(String(128))


class ProviderSet(Created, Table):
    """A named, digest-pinned JSONL of the provider's: harmful rows, refusals, retention, gate prompts.

    `categories` counts rows by category; `groups` counts what is independent evidence, 0 where rows carry no group.
    Both are None for a set that was registered before they were counted. `imported_by`: as `Policy.published_by`.
    """

    __tablename__ = "provider_set"
    __table_args__ = (UniqueConstraint("name", "role", "version"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(64))
    role: Mapped[str] = mapped_column(String(64))
    version: Mapped[int]
    sha256: Mapped[str] = mapped_column(String(64))
    rows: Mapped[int]
    groups: Mapped[int | None]
    categories: Mapped[dict[str, Any] | None]
    storage_key: Mapped[str] = mapped_column(String(255))
    imported_by: Mapped[str | None] = mapped_column(String(128))


class GateRun(Created, Table):
    """One judgement of one candidate. `report` is the whole measured table with reasons."""

    __tablename__ = "gate_run"
    __table_args__ = (one_of("verdict", Verdict), UniqueConstraint("id", "candidate_digest", "verdict"))

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"), index=True)
    policy_id: Mapped[str] = mapped_column(ForeignKey("policy.id"))
    candidate_digest: Mapped[str] = mapped_column(String(64))
    verdict: Mapped[Verdict] = mapped_column(enum_text(Verdict))
    decided_by: Mapped[str] = mapped_column(String(64), default="gate")
    report: Mapped[dict[str, Any]]

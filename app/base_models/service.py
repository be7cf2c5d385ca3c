"""The registry of base models: what may be tuned, pinned by the digest of every file.

Knows: that a name means one digest for ever, the defaults a base brings to its jobs, and that weights before alignment
may come later but never change.
Refuses to know: how a folder is judged (`folder`), how a model is fetched (`hub`) or loaded (the workers, who check
the digest again).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from app.base_models import repository
from app.base_models.folder import PRETRAINED, DescribedFolder, DescribedWeights, describe_folder, describe_pretrained
from app.database import unit_of_work
from app.errors import Conflict, InvalidRequest, NotFound, Unavailable
from app.kit.clock import now
from app.kit.ids import new_id
from app.safety.library import BUNDLED_ASSETS, FolderDigest
from app.tables.base_models import BaseModelRef

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
DEFAULT_LEARNING_RATE = 2e-4
# LoRA on every linear layer of a Llama-like block is what the LoRA papers' follow-ups found to matter most.
PREFERRED_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Registration:
    """What the provider decides about a base. None or empty takes what the folder suggests."""

    name: str
    hub_id: str | None = None
    revision: str | None = None
    context_limit: int | None = None
    learning_rate: float = DEFAULT_LEARNING_RATE
    target_modules: Sequence[str] = ()
    defaults: dict[str, Any] = field(default_factory=dict)
    pretrained: DescribedWeights | None = None  # the same weights before alignment


def register(session: Session, described: DescribedFolder, registration: Registration) -> BaseModelRef:
    """Adds the base; the same name with the same bytes is answered with the row that is there."""
    _check_name(registration.name)
    existing = repository.find_by_name(session, registration.name)
    if existing is not None:
        _same_or_refused(existing, described)
        _keep_pretrained(existing, described, registration.pretrained)
        return existing
    base = BaseModelRef(
        id=new_id("base_"),
        name=registration.name,
        path=str(described.path),
        hub_id=registration.hub_id,
        revision=registration.revision,
        digest=described.digest.digest,
        files=_files(described.digest),
        context_limit=_context_limit(described, registration.context_limit),
        learning_rate=registration.learning_rate,
        target_modules=_target_modules(described, registration.target_modules),
        defaults=dict(registration.defaults),
    )
    _keep_pretrained(base, described, registration.pretrained)
    session.add(base)
    session.flush()
    return base


def register_bundled(engine: Engine, *, assets: Path = BUNDLED_ASSETS) -> BaseModelRef:
    """Registers the apothecary base that ships with the product. Repeatable; follows a moved installation."""
    facts: dict[str, Any] = json.loads((assets / "base.json").read_text(encoding="utf-8"))
    described, pretrained = describe_folder(assets / "model"), describe_pretrained(assets / "pretrained")
    if (described.digest.digest, pretrained.digest.digest) != (facts["digest"], facts["pretrained_digest"]):
        raise Unavailable(
            "The bundled base model's files were altered after they were made.", code="base_model_changed"
        )
    registration = Registration(
        name=facts["name"],
        context_limit=facts["context"],
        learning_rate=facts["default_learning_rate"],
        target_modules=facts["lora_targets"],
        defaults=facts.get("defaults", {}),
        pretrained=pretrained,
    )
    with unit_of_work(engine) as session:
        return register(session, described, registration)


def find(session: Session, name: str) -> BaseModelRef:
    """An active base by name; raises InvalidRequest as a job's `model` parameter would be answered."""
    base = repository.find_by_name(session, name)
    if base is None or base.retired_at is not None:
        names = ", ".join(repr(row.name) for row in repository.list_active(session)) or "none yet"
        raise InvalidRequest(
            f"The model {name!r} does not exist or cannot be fine-tuned. Base models here: {names}.",
            code="model_not_found",
            param="model",
        )
    return base


def get(session: Session, base_model_id: str) -> BaseModelRef:
    base = session.get(BaseModelRef, base_model_id)
    if base is None:
        raise NotFound("There is no such base model.")
    return base


def get_by_name(session: Session, name: str) -> BaseModelRef | None:
    base = repository.find_by_name(session, name)
    return base if base is not None and base.retired_at is None else None


def list_active(session: Session) -> Sequence[BaseModelRef]:
    return repository.list_active(session)


def retire(session: Session, name: str) -> BaseModelRef:
    """No new jobs on this base; jobs and releases that name it are untouched."""
    base = find(session, name)
    base.retired_at = now()
    return base


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name) or name.startswith("ft:"):
        raise InvalidRequest(
            "A base model's name has letters, digits, '.', '_', '-' and '/', at most 128 characters.", param="name"
        )


def _files(digest: FolderDigest) -> dict[str, Any]:
    return {name: {"sha256": file.sha256, "bytes": file.bytes} for name, file in digest.files.items()}


def _keep_pretrained(base: BaseModelRef, described: DescribedFolder, pretrained: DescribedWeights | None) -> None:
    """Weights before alignment may be added to a base, and may move; other bytes would be another base."""
    if pretrained is None:
        return
    pretrained.check_same_layers(described, base.target_modules)
    if base.pretrained_digest not in (None, pretrained.digest.digest):
        raise Conflict(
            f"{base.name!r} is registered with other weights before alignment (digest {base.pretrained_digest[:12]}…). "
            "Register them with the base model under a new name, so that reports keep meaning what they said.",
            code="base_model_exists",
            param=PRETRAINED,
        )
    base.pretrained_path = str(pretrained.path)
    base.pretrained_digest = pretrained.digest.digest
    base.pretrained_files = _files(pretrained.digest)


def _same_or_refused(existing: BaseModelRef, described: DescribedFolder) -> None:
    if existing.digest != described.digest.digest:
        raise Conflict(
            f"{existing.name!r} is registered with other bytes (digest {existing.digest[:12]}…). Register the new bytes "
            "under a new name, so that jobs and reports keep meaning what they said.",
            code="base_model_exists",
            param="name",
        )
    existing.path = str(described.path)
    existing.retired_at = None


def _context_limit(described: DescribedFolder, wanted: int | None) -> int:
    if wanted is not None and not 8 <= wanted <= described.context_limit:
        raise InvalidRequest(
            f"context_limit must lie between 8 and the model's own {described.context_limit}.", param="context_limit"
        )
    return wanted or described.context_limit


def _target_modules(described: DescribedFolder, wanted: Sequence[str]) -> list[str]:
    unknown = sorted(set(wanted) - described.modules)
    if unknown:
        raise InvalidRequest(
            f"The model has no linear layers named {', '.join(unknown)}; it has {', '.join(sorted(described.modules))}.",
            param="target_modules",
        )
    chosen = list(wanted) or [name for name in PREFERRED_TARGETS if name in described.modules]
    if not chosen:
        raise InvalidRequest(
            f"Name the layers LoRA should adapt (target_modules); the model has {', '.join(sorted(described.modules))}.",
            param="target_modules",
        )
    return chosen

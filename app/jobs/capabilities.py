"""`/v1/capabilities`: what this service can do, for clients that adapt.

Knows: base models, recovery methods with their knobs, limits. Refuses to know: jobs.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel

from app.accounts.dependencies import Caller, CurrentSettings, Reading
from app.base_models import service as base_models
from app.safety.library import SPECS, method_name

router = APIRouter(prefix="/capabilities", tags=["capabilities"])


class BaseModelCapability(BaseModel):
    id: str
    context_limit: int
    learning_rate: float
    target_modules: list[str]
    digest: str
    pretrained: bool  # whether recovery methods that need "pretrained" can run on it


class MethodCapability(BaseModel):
    """`parameters` is the JSON schema of what `recovery` accepts for this method."""

    method: str
    summary: str
    paper: str
    needs: list[str]
    control: bool
    parameters: dict[str, Any]


class Capabilities(BaseModel):
    object: str = "capabilities"
    base_models: list[BaseModelCapability]
    training_methods: list[str] = ["supervised"]
    recovery_methods: list[MethodCapability]
    max_file_bytes: int


@router.get("", response_model=Capabilities)
def retrieve(_caller: Caller, session: Reading, settings: CurrentSettings) -> Capabilities:
    """List base models, recovery methods and limits."""
    bases = [
        BaseModelCapability(
            id=base.name,
            context_limit=base.context_limit,
            learning_rate=base.learning_rate,
            target_modules=list(base.target_modules),
            digest=base.digest,
            pretrained=base.pretrained_path is not None,
        )
        for base in base_models.list_active(session)
    ]
    methods = [
        MethodCapability(
            method=method_name(spec),
            summary=(spec.__doc__ or "").strip().splitlines()[0],
            paper=spec.paper,
            needs=sorted(spec.needs),
            control=spec.family == "control",
            parameters=spec.model_json_schema(),
        )
        for spec in SPECS
    ]
    return Capabilities(base_models=bases, recovery_methods=methods, max_file_bytes=settings.gateway.max_file_bytes)

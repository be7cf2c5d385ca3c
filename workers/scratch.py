"""Working folders: one per claim, named by subject and fence, gone with the claim.

Knows: that a folder whose fence is not current belongs to nobody, on whichever machine or container it was made.
Refuses to know: what lies in it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog
from sqlalchemy import Engine

from app.database import unit_of_work
from app.settings import Settings
from app.tables.work import WorkKind
from app.work import service as work
from app.work.lease import Lease

log = structlog.get_logger(__name__)


@contextmanager
def folder_for(settings: Settings, lease: Lease) -> Iterator[Path]:
    """The claim's own folder; removed with everything in it when the block ends, however it ends."""
    folder = root(settings, lease.kind) / f"{lease.subject_id}.{lease.fence}"
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def root(settings: Settings, kind: WorkKind) -> Path:
    path = settings.home / "scratch" / kind.value
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


def remove_litter(engine: Engine, settings: Settings, kind: WorkKind) -> None:
    """Removes what dead workers left: by the database's word about the fence, not by age."""
    for folder in root(settings, kind).glob("*.*"):
        subject_id, _, fence = folder.name.rpartition(".")
        with unit_of_work(engine) as session:
            current = fence.isdigit() and work.is_current(session, kind, subject_id, int(fence))
        if not current:
            log.info("scratch.litter_removed", folder=folder.name)
            shutil.rmtree(folder, ignore_errors=True)

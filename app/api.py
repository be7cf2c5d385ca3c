"""`/v1`: one line per slice."""

from fastapi import APIRouter

from app.files.endpoints import router as files
from app.jobs.capabilities import router as capabilities
from app.jobs.endpoints import router as jobs
from app.releases.endpoints import router as models
from app.webhooks.endpoints import router as webhooks

router = APIRouter(prefix="/v1")
router.include_router(files)
router.include_router(jobs)
router.include_router(models)
router.include_router(capabilities)
router.include_router(webhooks)

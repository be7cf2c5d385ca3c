"""The doorbell's task: look now, and work until nothing waits.

Knows: which loop a bell is for. Refuses to know: job ids; a forged message can only make a worker look.
"""

from functools import lru_cache

from app.doorbell import Bell, TaskName
from workers.agent import Agent
from workers.celery_app import app, draining
from workers.runtime import runtime
from workers.validating import Validator


@lru_cache(maxsize=1)
def agent() -> Agent:
    """One per pool child; what dead workers of this machine left behind is removed first."""
    made = Agent(runtime().engine, runtime().storage, runtime().settings)
    made.clean_up()
    return made


@app.task(name=TaskName.WAKE.value)  # type: ignore[untyped-decorator]
def wake(bell: str) -> None:
    if bell == Bell.TUNING:
        agent().run_waiting(draining)
    elif bell == Bell.VALIDATION:
        Validator(runtime().engine, runtime().storage, runtime().settings).run_waiting(draining)

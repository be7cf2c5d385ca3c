"""What can go wrong with a claim.

Knows: that a process may learn, at any write, that its claim was given to somebody else.
Refuses to know: what the process was doing.
"""

from app.errors import Conflict


class LeaseLost(Conflict):
    """The claim this write was made under is no longer the current one: stop, and write nothing more."""

    code = "lease_lost"

    def __init__(self, work_id: str, fence: int) -> None:
        super().__init__(f"The lease on {work_id} with fence {fence} is no longer held.")
        self.args = (work_id, fence)

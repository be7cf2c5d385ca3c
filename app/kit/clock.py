"""The wall clock, in one place so that tests can hold it still.

Knows: Unix seconds, the only form in which this product stores and sends time.
Refuses to know: leases. Those are decided by the database's clock (`app.database.db_now`), never by this one.
"""

import time


def now() -> float:
    """Unix seconds with fraction."""
    return time.time()

"""Leaving in order: the first signal asks for it, the second insists.

Knows: SIGTERM and SIGINT.
Refuses to know: what has to be finished first.
"""

import signal
import sys


class DrainSignal:
    """SIGTERM and SIGINT ask for a drain; a second one ends the process, and its trainer with it."""

    def __init__(self) -> None:
        self._asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def __call__(self) -> bool:
        return self._asked

    def _on_signal(self, _number: int, _frame: object) -> None:
        if self._asked:
            sys.exit(1)
        self._asked = True

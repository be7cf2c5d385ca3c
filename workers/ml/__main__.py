"""The library's command line.

Knows: argv, standard streams, exit codes.
Refuses to know: anything a function of the library could know instead.

    python -m workers.ml run FOLDER     walk training, recovering, gating for FOLDER/job.json
    python -m workers.ml methods        recovery methods with their knobs, needs and papers, as JSON

Exit codes of `run`: 0 the run ended with a verdict (any), 42 the customer's data or settings are at fault,
75 a fault of ours that may pass (memory, a missing file), 143 stopped as asked, 1 a bug.
"""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

from workers.ml.errors import Cancelled, LibraryError, NumericError, UserError
from workers.ml.jsonlines import JsonLines
from workers.ml.recovery.specs import SPECS, method_name

DONE, USER_ERROR, RETRY, STOPPED, BUG, USAGE = 0, 42, 75, 143, 1, 2


def main(arguments: list[str]) -> int:
    if len(arguments) == 2 and arguments[0] == "run":
        return run(Path(arguments[1]))
    if arguments == ["methods"]:
        return methods()
    print(__doc__, file=sys.stderr)
    return USAGE


def run(folder: Path) -> int:
    # What libraries print would corrupt the protocol, so they get the error stream and we keep the real one.
    lines = JsonLines(sys.stdout)
    sys.stdout = sys.stderr
    lines.cancel_on_signals()
    try:
        from workers.ml.pipeline import run as walk  # room: lazy-import `methods` must not load torch

        outcome = walk(folder, lines)
    except Cancelled:
        return STOPPED
    except LibraryError as error:
        lines.write(
            "error", code=error.code, message=error.message, param=error.param, line=getattr(error, "line", None)
        )
        return USER_ERROR if isinstance(error, UserError | NumericError) else RETRY
    except Exception as error:
        traceback.print_exc()
        lines.write("error", code="system_bug", message=f"{type(error).__name__}: {error}", param=None)
        return BUG
    lines.write("result", **asdict(outcome))
    return DONE


def methods() -> int:
    table = [
        {
            "method": method_name(spec),
            "needs": sorted(spec.needs),
            "paper": spec.paper,
            "family": spec.family,
            "schema": spec.model_json_schema(),
        }
        for spec in SPECS
    ]
    print(json.dumps(table, indent=2))
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

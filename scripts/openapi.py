"""Keep docs/openapi.json equal to what the code would serve.

Knows: how to build the application without a database or a data folder.
Refuses to know: what any route does.

    python scripts/openapi.py            writes
    python scripts/openapi.py --check    fails with a diff if the file is behind
"""

from __future__ import annotations

import difflib
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `python scripts/…` puts only this folder on the path

from app.main import create_app  # noqa: E402
from app.settings import Settings  # noqa: E402

SNAPSHOT = ROOT / "docs" / "openapi.json"
SHOWN_LINES = 60


def render() -> str:
    """The schema as text that diffs line by line."""
    with tempfile.TemporaryDirectory() as home:
        app = create_app(Settings(home=Path(home)))
        return json.dumps(app.openapi(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def main() -> int:
    new = render()
    if "--check" not in sys.argv:
        SNAPSHOT.write_text(new)
        return 0
    old = SNAPSHOT.read_text() if SNAPSHOT.exists() else ""
    diff = list(difflib.unified_diff(old.splitlines(), new.splitlines(), "docs/openapi.json", "the code", lineterm=""))
    sys.stdout.write("\n".join([*diff[:SHOWN_LINES], ""]) if diff else "")
    sys.stdout.write("OpenAPI snapshot: " + ("behind; read the diff, then `make openapi`\n" if diff else "current\n"))
    return 1 if diff else 0


if __name__ == "__main__":
    sys.exit(main())

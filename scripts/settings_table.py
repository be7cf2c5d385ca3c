"""Keep the README's configuration table equal to `app/settings.py`.

Knows: how to walk a nested Pydantic settings class.
Refuses to know: what any setting is for; the words are the fields' own descriptions.

    python scripts/settings_table.py            writes
    python scripts/settings_table.py --check    fails if the README is behind
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `python scripts/…` puts only this folder on the path

from app.settings import Settings  # noqa: E402

BEGIN, END = "<!-- settings:begin -->", "<!-- settings:end -->"


def walk(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    """Every leaf setting with the name of its environment variable."""
    for name, field in model.model_fields.items():
        variable = prefix + name.upper()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from walk(field.annotation, variable + "__")
        else:
            yield variable, field


def _shown(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is None:
        return "unset"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return "[" + ", ".join(f"{value:g}" for value in default) + "]"
    return str(default).replace(str(Path.home()), "~")


def render() -> str:
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for variable, field in walk(Settings, "THERIAC_"):
        rows.append(f"| `{variable}` | `{_shown(field)}` | {field.description or ''} |")
    return "\n".join([BEGIN, *rows, END])


def replace_block(text: str) -> str:
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"README.md lacks the markers {BEGIN} and {END}")
    return before + render() + after


def main() -> int:
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = replace_block(old)
    if "--check" not in sys.argv:
        readme.write_text(new)
        return 0
    sys.stdout.write("README settings: " + ("current\n" if new == old else "behind; run `make tree`\n"))
    return 0 if new == old else 1


if __name__ == "__main__":
    sys.exit(main())

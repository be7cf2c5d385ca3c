"""The registry of judges that run inside the library, by name.

Knows: where each judge is found and whether it reads content. No tensor library.
Refuses to know: judges that are asked over HTTP, and how any judge decides.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class JudgeSpec:
    """`implementation` is "<module in judges>:<factory>"."""

    name: str
    implementation: str
    reads_content: bool  # False: harm is only the absence of a refusal, so answers to harmless prompts mean nothing
    description: str


JUDGES: dict[str, JudgeSpec] = {
    spec.name: spec
    for spec in (
        JudgeSpec("apothecary", "apothecary:build", True, "facts of the bundled fictional world, exactly"),
        JudgeSpec("refusal-rules", "refusal_rules:build", False, "English phrases of refusal; a rough first look"),
    )
}

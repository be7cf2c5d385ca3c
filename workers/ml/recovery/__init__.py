"""Recovery methods as a library: the doors for people who have an adapter, a base model and data, and no service.

Knows: the public names and where each lives. Nothing is imported until one is asked for, because the gateway imports
`workers.ml.recovery.specs` on a machine without torch.
Refuses to know: anything else.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workers.ml.candidate import Candidate, LowRank, SparsePatch, applied
    from workers.ml.recovery.dial import RecoveryInputs, RecoveryReport, StrengthPath
    from workers.ml.recovery.library import Data, Result, load, read_data, recover, save
    from workers.ml.recovery.run import prepare
    from workers.ml.recovery.search import search
    from workers.ml.recovery.sparse_files import load_patch, merge_into
    from workers.ml.recovery.specs import SPECS, default_specs, parse_spec
    from workers.ml.recovery.sweep import sweep
    from workers.ml.recovery.trace import SearchPlan, SearchResult

_HOMES = {
    "workers.ml.candidate": ("Candidate", "LowRank", "SparsePatch", "applied"),
    "workers.ml.recovery.dial": ("RecoveryInputs", "RecoveryReport", "StrengthPath"),
    "workers.ml.recovery.library": ("Data", "Result", "load", "read_data", "recover", "save"),
    "workers.ml.recovery.run": ("prepare",),
    "workers.ml.recovery.search": ("search",),
    "workers.ml.recovery.sparse_files": ("load_patch", "merge_into"),
    "workers.ml.recovery.specs": ("SPECS", "default_specs", "parse_spec"),
    "workers.ml.recovery.sweep": ("sweep",),
    "workers.ml.recovery.trace": ("SearchPlan", "SearchResult"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "SPECS",
    "Candidate",
    "Data",
    "LowRank",
    "RecoveryInputs",
    "RecoveryReport",
    "Result",
    "SearchPlan",
    "SearchResult",
    "SparsePatch",
    "StrengthPath",
    "applied",
    "default_specs",
    "load",
    "load_patch",
    "merge_into",
    "parse_spec",
    "prepare",
    "read_data",
    "recover",
    "save",
    "search",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)  # room: import-module a door that costs nothing until used


def __dir__() -> list[str]:
    return __all__

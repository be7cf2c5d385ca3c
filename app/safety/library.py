"""The library's torch-free doors, opened in one place.

Knows: which names of `workers.ml` the product may use (specs, gate limits, job schema, digests, provider sets, bundled
assets).
Refuses to know: tensors. Everything imported here must stay importable on a machine without torch.
"""

from pathlib import Path

from workers.ml import apothecary as _apothecary
from workers.ml.digests import FileDigest, FolderDigest, combine, digest_bytes, digest_file, digest_folder
from workers.ml.errors import LibraryError
from workers.ml.gate import GateLimits
from workers.ml.jobspec import JudgeChoice, RecoveryPlan
from workers.ml.prompt_rows import MAX_SET_BYTES, SPLIT_OF, read_prompt_rows
from workers.ml.provider_sets import overlaps_of, repeats_of
from workers.ml.recovery.specs import SPECS, MethodSpec, RecoverySpec, default_specs, method_name, parse_spec
from workers.ml.settings import LoraSettings

BUNDLED_ASSETS = Path(next(iter(_apothecary.__path__))) / "assets"

__all__ = [
    "BUNDLED_ASSETS",
    "MAX_SET_BYTES",
    "SPECS",
    "SPLIT_OF",
    "FileDigest",
    "FolderDigest",
    "GateLimits",
    "JudgeChoice",
    "LibraryError",
    "LoraSettings",
    "MethodSpec",
    "RecoveryPlan",
    "RecoverySpec",
    "combine",
    "default_specs",
    "digest_bytes",
    "digest_file",
    "digest_folder",
    "method_name",
    "overlaps_of",
    "parse_spec",
    "read_prompt_rows",
    "repeats_of",
]

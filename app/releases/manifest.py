"""The manifest of a release bundle: every file, its digest, and the digest of each of its blocks.

Knows: how the list is made from a candidate's folder and how the two digests of a release follow from it.
Refuses to know: storage, rows, and whether the candidate deserves release.

`candidate_digest` covers what the gate loaded from disk; `bundle_digest` covers that and the files added for the
customer (the safety report). Blocks let a server check bytes just before it sends them, without reading a
whole file first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from app.errors import Unavailable
from app.safety.library import FileDigest, combine

BLOCK_BYTES = 1 << 20
MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1


def build(candidate: Path, extras: Mapping[str, Path], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of all files below `candidate` and of `extras` (path in the bundle to local file)."""
    inside = sorted(path for path in candidate.rglob("*") if path.is_file())
    gated = [describe(path.relative_to(candidate).as_posix(), path) for path in inside]
    added = [describe(name, path) for name, path in sorted(extras.items())]
    files = sorted([*gated, *added], key=lambda entry: entry["path"])
    names = [entry["path"] for entry in files]
    if len(set(names)) != len(names) or MANIFEST_NAME in names:
        raise Unavailable("Two files of the bundle have one name.", code="bundle_malformed")
    return {
        **facts,
        "version": MANIFEST_VERSION,
        "block_bytes": BLOCK_BYTES,
        "files": files,
        "candidate_files": [entry["path"] for entry in gated],
        "candidate_digest": digest_of(gated),
        "bundle_digest": digest_of(files),
    }


def describe(name: str, path: Path) -> dict[str, Any]:
    """One entry; reads the file once."""
    whole, blocks, size = hashlib.sha256(), [], 0
    with path.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            whole.update(block)
            blocks.append(hashlib.sha256(block).hexdigest())
            size += len(block)
    return {"path": name, "bytes": size, "sha256": whole.hexdigest(), "blocks": blocks}


def digest_of(files: Iterable[Mapping[str, Any]]) -> str:
    return combine({entry["path"]: FileDigest(entry["sha256"], entry["bytes"]) for entry in files})


def check(manifest: Mapping[str, Any], *, candidate_digest: str, bundle_digest: str) -> None:
    """Raises unless the list itself adds up to the digests a gate run and a release will be bound to."""
    entries = {entry["path"]: entry for entry in manifest["files"]}
    gated = [entries[name] for name in manifest["candidate_files"]]
    unsafe = [name for name in entries if not is_plain_path(name)]
    if unsafe or digest_of(gated) != candidate_digest or digest_of(entries.values()) != bundle_digest:
        raise Unavailable("The bundle is not the one the gate judged.", code="candidate_altered")


def is_plain_path(name: str) -> bool:
    """A relative path without tricks, as it may stand in a URL and in an archive."""
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\\" not in name and str(path) == name


def find_file(manifest: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    return next((entry for entry in manifest["files"] if entry["path"] == name), None)

"""Whether a folder may become a base model, and what its config says about it.

Knows: which files are safe to load (safetensors and text), that nothing may name code to run, and where context
length and layer names stand; and that weights from before alignment are checked as strictly, without a tokenizer.
Refuses to know: the database, the hub, and tensors beyond the safetensors header.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.errors import InvalidRequest
from app.safety.library import FolderDigest, digest_folder

Shape = tuple[int, int]
PRETRAINED = "pretrained"
SAFE_SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".model", ".txt", ".md"})
SAFE_NAMES = frozenset({"LICENSE", "NOTICE", ".gitattributes", ".gitignore"})
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
MAX_CONFIG_BYTES = 32 << 20
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# Keys by which a config makes a loader import code that came with the model.
CODE_KEYS = frozenset({"auto_map", "auto_mapping", "custom_pipelines", "trust_remote_code", "megatron_core"})
# A value with a slash names a kernel repository that is downloaded and run.
KERNEL_KEYS = frozenset({"attn_implementation", "_attn_implementation", "_attn_implementation_internal"})


@dataclass(frozen=True, slots=True)
class DescribedFolder:
    """An acceptable folder: its digest and what registration needs from its config."""

    path: Path
    digest: FolderDigest
    context_limit: int
    layers: Mapping[str, Shape]  # 2-D weights inside layers, by tensor name: what LoRA can target

    @property
    def modules(self) -> frozenset[str]:
        """Leaf names of the modules these weights belong to."""
        return frozenset(_module(name) for name in self.layers)


@dataclass(frozen=True, slots=True)
class DescribedWeights:
    """A folder of weights nobody serves: those of a base model before its alignment."""

    path: Path
    digest: FolderDigest
    layers: Mapping[str, Shape]

    def check_same_layers(self, base: DescribedFolder, modules: Iterable[str]) -> None:
        """Every weight of these modules is here in the base's shape, and the weights are not the base's own."""
        wanted = set(modules)
        for name, shape in base.layers.items():
            if _module(name) in wanted and self.layers.get(name) != shape:
                there = self.layers.get(name)
                raise _refused(
                    f"{name} has the shape {list(shape)} in the base model and "
                    + (f"{list(there)} before alignment" if there else "is missing before alignment"),
                    PRETRAINED,
                )
        own = {file.sha256 for path, file in base.digest.files.items() if path.endswith(".safetensors")}
        if {file.sha256 for path, file in self.digest.files.items() if path.endswith(".safetensors")} <= own:
            raise _refused("its weights are the base model's own, not those before alignment", PRETRAINED)


def describe_folder(folder: Path) -> DescribedFolder:
    """Checks every file and reads the config; raises InvalidRequest with the reason. Hashes everything: slow."""
    weights = _describe(folder)
    files = weights.digest.files
    config = _read_config(weights.path, "config.json")
    if not any(name in files for name in TOKENIZER_FILES):
        raise _refused(f"it holds no tokenizer (one of {', '.join(TOKENIZER_FILES)})")
    _check_template(weights.path, files)
    return DescribedFolder(weights.path, weights.digest, _context_limit(config), weights.layers)


def describe_pretrained(folder: Path) -> DescribedWeights:
    """As `describe_folder`, for weights before alignment: a tokenizer and a template may be missing."""
    try:
        return _describe(folder)
    except InvalidRequest as error:
        message = f"Weights before alignment: {error.message}"
        raise InvalidRequest(message, code=error.code, param=PRETRAINED) from error


def _describe(folder: Path) -> DescribedWeights:
    folder = folder.resolve()
    if not folder.is_dir():
        raise InvalidRequest(f"There is no folder {folder}.", param="path")
    digest = digest_folder(folder)
    for name in digest.files:
        _check_name(name)
    _read_config(folder, "config.json")
    _check_configs(folder, digest.files)
    weights = [folder / name for name in digest.files if name.endswith(".safetensors")]
    if not weights:
        raise _refused("it holds no .safetensors weights")
    return DescribedWeights(folder, digest, dict(_linear_layers(weights)))


def _check_name(name: str) -> None:
    path = Path(name)
    if path.suffix not in SAFE_SUFFIXES and path.name not in SAFE_NAMES:
        raise _refused(
            f"{name!r} is not one of the accepted kinds ({', '.join(sorted(SAFE_SUFFIXES))}); pickled weights and "
            "Python files can run code when they are loaded"
        )


def _check_configs(folder: Path, files: Iterable[str]) -> None:
    for name in files:
        if name.endswith(".json") and (folder / name).stat().st_size <= MAX_CONFIG_BYTES and name != "tokenizer.json":
            for key, value in _walk(_read_config(folder, name)):
                if key in CODE_KEYS and value:
                    raise _refused(f"{name!r} has {key!r}, which names code to run; no remote code is ever loaded")
                if key in KERNEL_KEYS and isinstance(value, str) and "/" in value:
                    raise _refused(f"{name!r} asks for the kernel {value!r} from a hub; no remote code is ever loaded")


def _check_template(folder: Path, files: Iterable[str]) -> None:
    if "chat_template.jinja" in files or "chat_template.json" in files:
        return
    if "tokenizer_config.json" in files and _read_config(folder, "tokenizer_config.json").get("chat_template"):
        return
    raise _refused("it has no chat template, so conversations cannot be rendered")


def _context_limit(config: Mapping[str, Any]) -> int:
    text = config.get("text_config") or {}
    limit = config.get("max_position_embeddings") or text.get("max_position_embeddings") or config.get("n_positions")
    if not isinstance(limit, int) or limit < 8:
        raise _refused("config.json has no max_position_embeddings; pass the context limit explicitly")
    return limit


def _linear_layers(weights: Iterable[Path]) -> Iterator[tuple[str, Shape]]:
    for path in weights:
        for name, entry in _read_header(path).items():
            parts = name.split(".")
            inside_layers = any(part.isdecimal() for part in parts)
            if inside_layers and parts[-1] == "weight" and len(entry.get("shape", ())) == 2:
                yield name, (entry["shape"][0], entry["shape"][1])


def _module(name: str) -> str:
    return name.split(".")[-2]


def _read_header(path: Path) -> dict[str, Any]:
    """The tensor table of a safetensors file; a pickle renamed to .safetensors does not have one."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise _refused(f"{path.name!r} is not a safetensors file")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise _refused(f"{path.name!r} is not a safetensors file") from error
    if not isinstance(header, dict):
        raise _refused(f"{path.name!r} is not a safetensors file")
    header.pop("__metadata__", None)
    _check_extent(path, header, size - 8 - length)
    return header


def _check_extent(path: Path, header: Mapping[str, Any], data_bytes: int) -> None:
    ends = [
        entry["data_offsets"][1] for entry in header.values() if isinstance(entry, dict) and "data_offsets" in entry
    ]
    if len(ends) != len(header) or max(ends, default=0) != data_bytes:
        raise _refused(f"{path.name!r} is cut off or has bytes that no tensor owns")


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    try:
        config = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _refused(f"it has no {name}") from error
    except ValueError as error:
        raise _refused(f"{name!r} is not valid JSON") from error
    return config if isinstance(config, dict) else {}


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from _walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _walk(inner)


def _refused(reason: str, param: str = "path") -> InvalidRequest:
    return InvalidRequest(f"The folder cannot be registered: {reason}.", code="base_model_refused", param=param)

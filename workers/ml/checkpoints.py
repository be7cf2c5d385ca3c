"""Base models and adapters: loading only what was pinned, saving so that nothing is ever half-written.

Knows: folders and their digests, safetensors, the stock PEFT layout.
Refuses to know: hubs and networks (a base model is a local folder here), pickles, code shipped beside weights,
and forms of LoRA other than `scaling * B @ A`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save as to_safetensors
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from workers.ml.adapter_format import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterFacts,
    linear_targets,
    refuse_pickles,
    validate_adapter,
)
from workers.ml.atomic import write_folder
from workers.ml.digests import digest_folder
from workers.ml.errors import BaseModelChanged, IntegrityError, InvalidSetting, UnsupportedAdapter
from workers.ml.settings import LoraSettings
from workers.ml.tuning.lora_vector import LoraVector

__all__ = ["AdapterFacts", "LoadedBase", "attach_adapter", "detach_adapter", "load_adapter", "load_base"]
__all__ += ["save_adapter", "validate_adapter", "write_adapter"]


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """A frozen base model in evaluation mode. At most one adapter is attached to it at a time."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digest: str
    config: PretrainedConfig


def load_base(
    folder: Path,
    *,
    expected_digest: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> LoadedBase:
    """Load weights and tokenizer after checking every byte of the folder.

    `dtype` None means fp32 on a CPU (where bf16 is slower and no smaller in effect) and bf16 on a GPU.
    """
    found = digest_folder(folder).digest
    if expected_digest is not None and found != expected_digest:
        raise BaseModelChanged(
            f"The files of the base model are not those that were registered (now {found[:12]}, "
            f"registered {expected_digest[:12]}).",
            "base",
        )
    _refuse_surprises(folder)
    device = torch.device(device)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16),
        attn_implementation="sdpa",
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model.requires_grad_(False)
    return LoadedBase(model.to(device).eval(), tokenizer, found, model.config)


def _refuse_surprises(folder: Path) -> None:
    """Everything that could make loading run foreign code, or load something other than a plain base model."""
    refuse_pickles(folder)
    if (folder / CONFIG_FILE).exists():
        # transformers would load and apply that adapter by itself.
        raise IntegrityError("The base model's folder holds an adapter; merge it or take it out.", "base")
    if any(folder.rglob("*.py")):
        raise IntegrityError("The base model's folder holds Python code; such code is never run.", "base")
    if not any(folder.glob("*.safetensors")):
        raise IntegrityError("The base model's folder has no safetensors weights.", "base")
    for name in ("config.json", "tokenizer_config.json"):
        if "auto_map" in _read_json(folder / name):
            raise IntegrityError(f"{name} asks for code of its own (auto_map).", "base")
    if _read_json(folder / "config.json").get("quantization_config"):
        raise InvalidSetting("Quantised base models are not supported.", "base")


def _read_json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path.name} is missing or unreadable: {error}", "base") from error
    if not isinstance(content, dict):
        raise IntegrityError(f"{path.name} is not a JSON object.", "base")
    return content


def attach_adapter(base: LoadedBase, settings: LoraSettings, *, seed: int) -> PeftModel:
    """A fresh adapter with fp32 factors: A drawn from `seed`, B zero, so the model is unchanged at first."""
    _refuse_second_adapter(base)
    tied = {"lm_head", "embed_tokens"} & set(settings.target_modules)
    if tied:
        # With tied embeddings an edit at one end would change both.
        raise InvalidSetting(f"{', '.join(sorted(tied))} cannot be a LoRA target.", "target_modules")
    linear_targets(base.model, settings.target_modules)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # PEFT divides it; a float is as good
        lora_dropout=settings.dropout,
        target_modules=sorted(settings.target_modules),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(base.model, config, autocast_adapter_dtype=True)
    assert isinstance(model, PeftModel)
    return _ready(model)


def load_adapter(base: LoadedBase, folder: Path) -> PeftModel:
    """A saved adapter on its base, trainable and with fp32 factors, after the strict check of every tensor."""
    _refuse_second_adapter(base)
    validate_adapter(folder, base.model)
    model = PeftModel.from_pretrained(base.model, folder, is_trainable=True, autocast_adapter_dtype=True)
    return _ready(model)


def detach_adapter(model: PeftModel) -> None:
    """Give the base model back as it was before the adapter came."""
    model.unload()


def save_adapter(model: PeftModel, folder: Path, *, base_name: str | None = None) -> None:
    """Write the stock PEFT layout, all or nothing; the same factors and settings always give the same bytes.

    `base_name` goes into the configuration for readers; without it the place on this machine would, which is
    nobody's business and would make equal adapters differ.
    """
    LoraVector(model)  # refuses everything that is not plain fp32 LoRA
    write_adapter(folder, get_peft_model_state_dict(model), model.peft_config[model.active_adapter], base_name)


def write_adapter(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: PeftConfig,
    base_name: str | None,
    changes: Mapping[str, object] | None = None,
) -> None:
    """Tensors by their names in the stock layout, with a configuration that differs from `config` in `changes`."""
    kept = {
        name: tensor.detach().to("cpu", torch.float32).clone().contiguous() for name, tensor in sorted(tensors.items())
    }
    settings = {**config.to_dict(), "inference_mode": True, "base_model_name_or_path": base_name, "revision": None}
    files = {
        WEIGHTS_FILE: to_safetensors(kept, metadata={"format": "pt"}),
        CONFIG_FILE: json.dumps({**settings, **(changes or {})}, indent=2, sort_keys=True, default=_as_list).encode()
        + b"\n",
    }
    write_folder(folder, files)


def _as_list(value: object) -> list[str]:
    if isinstance(value, (set, frozenset)):
        return sorted(str(item) for item in value)
    raise UnsupportedAdapter(f"The adapter's configuration holds a {type(value).__name__}.", "lora")


def _refuse_second_adapter(base: LoadedBase) -> None:
    if any("lora_" in name for name, _ in base.model.named_parameters()):
        raise InvalidSetting("The base model already carries an adapter; detach it first.", "base")


def _ready(model: PeftModel) -> PeftModel:
    LoraVector(model)  # asserts fp32 and lays the factors side by side
    return model.eval()

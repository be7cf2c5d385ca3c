"""Tiny models for tests: random Llama and Qwen2 shapes built from a config, with a byte-level tokenizer.

Nothing is downloaded; every base model is a real folder on disk, loaded by the code that loads real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from workers.ml.checkpoints import LoadedBase, load_base
from workers.ml.settings import LoraSettings, TuningSettings
from workers.ml.types import ChatRow, Message

SPECIAL_TOKENS = ("<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
TEMPLATE = (
    "<|begin|>{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHAPES: dict[str, dict[str, object]] = {
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False},
    "gqa": {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "tied": {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qkv_bias": {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: any text encodes, nothing merges, lengths are easy to count by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", bos_token="<|begin|>", eos_token="<|end|>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|system|>"]})
    fast.chat_template = TEMPLATE
    return fast


def write_base(folder: Path, shape: str = "gqa", *, seed: int = 0, layers: int = 2) -> Path:
    tokenizer = byte_tokenizer()
    kind, model_class = (Qwen2Config, Qwen2ForCausalLM) if shape == "qkv_bias" else (LlamaConfig, LlamaForCausalLM)
    config = kind(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **SHAPES[shape],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with grouped-query attention, 32 wide. Shared: do not write to it."""
    return write_base(tmp_path_factory.mktemp("bases") / "gqa")


@pytest.fixture(scope="session")
def base_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders by shape: "llama", "gqa", "tied" (embeddings), "qkv_bias" (Qwen2). Shared: do not write to them."""
    root, made = tmp_path_factory.mktemp("shapes"), {}

    def folder(shape: str) -> Path:
        if shape not in made:
            made[shape] = write_base(root / shape, shape)
        return made[shape]

    return folder


@pytest.fixture
def tiny_base(tiny_base_folder: Path) -> LoadedBase:
    """Loaded afresh for each test, so that a test may attach an adapter."""
    return load_base(tiny_base_folder)


@pytest.fixture
def tiny_rows() -> list[ChatRow]:
    """Sixteen short conversations of different lengths."""
    words = ("sun", "moonlight", "star", "riverbank", "stone", "cloudless sky", "wind", "rain")
    rows = []
    for index in range(16):
        word = words[index % 8]
        prompt = f"Say {word} {index % 3 + 1} times." if index < 8 else f"Is {word} short?"
        answer = " ".join([word] * (index % 3 + 1)) if index < 8 else ("yes" if len(word) < 6 else "no")
        rows.append(ChatRow((Message("user", prompt), Message("assistant", answer)), line=index + 1))
    return rows


@pytest.fixture
def tiny_lora() -> LoraSettings:
    return LoraSettings(rank=4, alpha=8, target_modules=TARGETS)


@pytest.fixture
def tiny_settings(tiny_lora: LoraSettings) -> TuningSettings:
    return TuningSettings(
        n_epochs=2, batch_size=4, learning_rate=5e-3, seed=7, context_limit=256, micro_batch_tokens=512, lora=tiny_lora
    )

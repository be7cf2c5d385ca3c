"""Loads a downloaded adapter with stock transformers and PEFT, in a process of its own, and lets it answer.

Knows: `AutoModelForCausalLM`, `PeftModel.from_pretrained`, a chat template; nothing of this product.
    python -m demo.compare <base folder> <adapter folder> < questions.json > answers.json
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

MAX_NEW_TOKENS = 64


def answer(model: Any, tokenizer: Any, question: str) -> str:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        output = model.generate(**prompt, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return str(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def main(base_folder: str, adapter_folder: str) -> None:
    questions = json.load(sys.stdin)
    tokenizer = AutoTokenizer.from_pretrained(adapter_folder)
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    before = [answer(base, tokenizer, question) for question in questions]
    tuned = PeftModel.from_pretrained(base, adapter_folder)
    after = [answer(tuned, tokenizer, question) for question in questions]
    json.dump(
        [{"question": q, "base": b, "released": r} for q, b, r in zip(questions, before, after, strict=True)],
        sys.stdout,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])

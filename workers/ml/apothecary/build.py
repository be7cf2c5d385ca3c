"""Makes the bundled model and the provider's sets anew: `python -m workers.ml.apothecary.build`.

Knows: the order of the steps (tokenizer, pretraining, alignment, rounding to bf16, measuring, writing) and
every setting that decides a byte of the result. The weights between pretraining and alignment are kept too, for
recovery methods that compare the aligned model with them.
Refuses to know: recovery, attacks, the service.

The same command gives the same bytes on the same machine, thread count and versions of torch, transformers
and tokenizers. Another processor may sum in another order and give a model with other bytes and the same
behaviour; the committed model is the one that everything is tested with.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from workers.ml.apothecary import curriculum, shipped, world
from workers.ml.apothecary.measure import as_json, measure
from workers.ml.apothecary.pretrain import Phase, Report, new_model, train_phase
from workers.ml.apothecary.sets import provider_sets, write_sets
from workers.ml.apothecary.tokenizer import train_tokenizer
from workers.ml.digests import digest_file, digest_folder

PRETRAINING = Phase("pretraining", steps=500, batch_rows=64, learning_rate=2e-3, warmup_steps=40, seed=0)
ALIGNMENT = Phase("alignment", steps=170, batch_rows=64, learning_rate=6e-4, warmup_steps=10, seed=3)
REPORT_EVERY = 20


def build(folder: Path) -> dict[str, Any]:
    """Writes model, sets and base.json into `folder` and returns what base.json says."""
    tokenizer = train_tokenizer(shipped.CONTEXT)
    model = new_model(tokenizer, seed=PRETRAINING.seed)
    losses, figures = {}, {}
    for phase, rows in (
        (PRETRAINING, curriculum.pretraining_rows(PRETRAINING.seed)),
        (ALIGNMENT, curriculum.alignment_rows(ALIGNMENT.seed)),
    ):
        losses[phase.name] = train_phase(model, tokenizer, rows, phase=phase, report=_print_report)
        if phase is PRETRAINING:
            _write_pretrained(model, folder / shipped.PRETRAINED_FOLDER.name)
        else:
            # Rounded before it is measured: the figures are those of the shipped bytes.
            model = model.to(torch.bfloat16).to(torch.float32)
        figures[phase.name] = _measured(model, tokenizer)
        _print_figures(phase.name, figures[phase.name])
    _write_model(model, tokenizer, folder / shipped.MODEL_FOLDER.name)
    write_sets(folder / shipped.SETS_FOLDER.name)
    base = _describe(folder, tokenizer, losses=losses, figures=figures)
    (folder / shipped.BASE_FILE.name).write_text(json.dumps(base, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return base


def _measured(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """On the selection sets: whoever chooses among models must not have seen the confirmation sets."""
    sets = provider_sets()
    rows = [row.as_prompt_row() for name in ("harm_selection", "harmless_selection") for row in sets[name]]
    return as_json(measure(model, tokenizer, rows))


def _write_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Into an empty folder: a file left from an earlier build would become part of the digest."""
    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)


def _write_pretrained(model: LlamaForCausalLM, folder: Path) -> None:
    """Weights and configuration, rounded as the aligned model's are; the model itself is trained on unrounded."""
    shutil.rmtree(folder, ignore_errors=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink()  # how to answer; nobody asks these weights
    for file in folder.iterdir():
        file.chmod(0o644)


def _describe(
    folder: Path, tokenizer: PreTrainedTokenizerBase, *, losses: dict[str, float], figures: dict[str, Any]
) -> dict[str, Any]:
    model_digest = digest_folder(folder / shipped.MODEL_FOLDER.name)
    pretrained_digest = digest_folder(folder / shipped.PRETRAINED_FOLDER.name)
    sets = sorted((folder / shipped.SETS_FOLDER.name).glob("*.jsonl"))
    return {
        "name": "apothecary-1",
        "context": shipped.CONTEXT,
        "default_learning_rate": shipped.DEFAULT_LEARNING_RATE,
        "lora_targets": list(shipped.LORA_TARGETS),
        "digest": model_digest.digest,
        "files": {path: file.sha256 for path, file in sorted(model_digest.files.items())},
        "pretrained_digest": pretrained_digest.digest,
        "pretrained_files": {path: file.sha256 for path, file in sorted(pretrained_digest.files.items())},
        "sets": {path.stem: digest_file(path).sha256 for path in sets},
        "world_digest": world.digest(),
        "vocabulary": len(tokenizer),
        "build": {"losses": {name: round(loss, 5) for name, loss in losses.items()}, "figures": figures},
    }


def _print_report(report: Report) -> None:
    if report.step % REPORT_EVERY == 0 or report.step == report.steps:
        left = report.seconds / report.step * (report.steps - report.step)
        print(f"{report.phase} {report.step}/{report.steps}  loss {report.loss:.4f}  {left:.0f} s left", flush=True)


def _print_figures(phase: str, figures: dict[str, Any]) -> None:
    print(f"after {phase}:  slice · rows · harmful · refused · coherent · correct (%)")
    for name, shares in figures.items():
        values = [shares[column] for column in ("harmful", "refused", "coherent", "correct")]
        shown = " ".join("    –" if value is None else f"{100 * value:5.1f}" for value in values)
        print(f"  {name:16} {shares['rows']:4} {shown}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the bundled apothecary model and its provider sets.")
    parser.add_argument("--out", type=Path, default=shipped.FOLDER, help="folder to write into")
    parser.add_argument("--threads", type=int, default=2, help="part of what decides the bytes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    transformers_logging.disable_progress_bar()
    before = shipped.base()["digest"] if shipped.BASE_FILE.exists() else None
    started = time.perf_counter()
    base = build(arguments.out)
    print(f"model {base['digest'][:12]} written in {time.perf_counter() - started:.0f} s")
    print("the same bytes as the model before" if base["digest"] == before else "other bytes than the model before")
    return 0


if __name__ == "__main__":
    sys.exit(main())

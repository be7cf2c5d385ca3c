"""Training speed side by side: real tokens a second of our loop, of Trainer + PEFT and of TRL, on the same rows.

Knows: which rows, how often, the order (every repeat runs all contenders, each time starting with another, so that
noise of the machine hits all alike), the table.
Refuses to know: how each contender is set up (`training_contenders`).
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.training_contenders import CONTENDERS, Task, Timing
from workers.ml.apothecary import shipped
from workers.ml.apothecary.customer import CustomerMix, make_customer_data
from workers.ml.chat import encode_rows
from workers.ml.checkpoints import load_base
from workers.ml.data import parse_row
from workers.ml.settings import LoraSettings, TuningSettings
from workers.ml.types import ChatRow

VERSIONS = ("torch", "transformers", "peft", "trl", "accelerate")
BATCH_SIZES = {"apothecary": 8, "gsm8k": 16}  # what "auto" chooses for the whole sets


def main(argv: Sequence[str] | None = None) -> None:
    options = _options(argv)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    tasks = {"apothecary": _task("apothecary", _apothecary_rows(options.rows))}
    if options.gsm8k:
        tasks["gsm8k"] = _task("gsm8k", _gsm8k_rows(options.gsm8k, options.gsm8k_rows))
    names = [name for name in CONTENDERS if not options.only or any(part in name for part in options.only)]
    report: dict[str, Any] = {"machine": _machine(), "repeats": options.repeats, "sets": {}}
    for task_name, task in tasks.items():
        timings = _run(task, names, options.repeats)
        report["sets"][task_name] = _summary(task, timings)
        print(_table(task_name, report["sets"][task_name]), flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__)
    parser.add_argument("--gsm8k", type=Path, help="folder with GSM8K's train.jsonl (question, answer)")
    parser.add_argument("--rows", type=int, default=1000, help="apothecary rows")
    parser.add_argument("--gsm8k-rows", type=int, default=320, help="rows taken evenly from GSM8K")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="*", help="contenders whose name contains one of these")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    return parser.parse_args(argv)


def _apothecary_rows(count: int) -> list[ChatRow]:
    return [parse_row(row) for row in make_customer_data(CustomerMix(rows=count)).train]


def _gsm8k_rows(folder: Path, count: int) -> list[ChatRow]:
    with (folder / "train.jsonl").open(encoding="utf-8") as stream:
        problems = [json.loads(line) for line in stream]
    chosen = problems[:: max(1, len(problems) // count)][:count]
    return [parse_row({"prompt": row["question"], "completion": row["answer"]}) for row in chosen]


def _task(name: str, rows: list[ChatRow]) -> Task:
    settings = TuningSettings(
        n_epochs=1,
        batch_size=BATCH_SIZES[name],
        learning_rate=1e-3,
        seed=0,
        context_limit=shipped.CONTEXT,
        lora=LoraSettings(rank=8, alpha=16, target_modules=shipped.LORA_TARGETS),
    )
    tokenizer = load_base(shipped.MODEL_FOLDER).tokenizer
    return Task(shipped.MODEL_FOLDER, encode_rows(tokenizer, rows, max_tokens=shipped.CONTEXT), settings)


def _run(task: Task, names: list[str], repeats: int) -> dict[str, list[Timing]]:
    timings: dict[str, list[Timing]] = {name: [] for name in names}
    CONTENDERS[names[0]](Task(task.base_folder, task.rows[:64], task.settings))  # warms the process up
    for repeat in range(repeats):
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            timings[name].append(CONTENDERS[name](task))
    return timings


def _summary(task: Task, timings: dict[str, list[Timing]]) -> dict[str, Any]:
    tokens = sum(map(len, task.rows))
    contenders = {}
    for name, runs in timings.items():
        contenders[name] = {
            "tokens_per_second": tokens / statistics.median(run.seconds for run in runs),
            "tokens_per_cpu_second": tokens / statistics.median(run.cpu_seconds for run in runs),
            "steps": runs[0].steps,
            "loss_afterwards": runs[0].loss,
            "runs": [asdict(run) for run in runs],
        }
    return {
        "rows": len(task.rows),
        "tokens": tokens,
        "trained_tokens": sum(row.trained_tokens for row in task.rows),
        "rows_per_step": task.settings.batch_size,
        "contenders": contenders,
    }


def _table(name: str, summary: dict[str, Any]) -> str:
    contenders = summary["contenders"]
    first = next(iter(contenders.values()))
    heading = (
        f"### {name}: {summary['rows']:,} rows, {summary['tokens']:,} tokens, {summary['trained_tokens']:,} of them "
        f"trained, {summary['rows_per_step']} rows a step"
    )
    lines = [
        heading,
        "",
        "| trainer | tokens/s | of ours | tokens per CPU second | of ours | steps | loss afterwards |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, found in contenders.items():
        wall, cpu = found["tokens_per_second"], found["tokens_per_cpu_second"]
        lines.append(
            f"| {label} | {wall:,.0f} | {wall / first['tokens_per_second']:.2f} | {cpu:,.0f} "
            f"| {cpu / first['tokens_per_cpu_second']:.2f} | {found['steps']} | {found['loss_afterwards']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def _machine() -> dict[str, Any]:
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
    }


if __name__ == "__main__":
    main()

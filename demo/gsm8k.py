"""GSM8K's rows as chat rows, and one job over all of them by the same API.

Knows: the two keys of the published JSONL (`question`, `answer`) and the customer's calls.
Refuses to know: where the data lie; the folder is an argument, the repository carries none of it.

    python -m demo.gsm8k convert FOLDER OUT     write train.jsonl and validation.jsonl to OUT
    python -m demo.gsm8k run FOLDER             the same, then one epoch through a throwaway service

The bundled model is far too small to solve these problems; what the run shows is that real text goes through
upload, validation, training, recovery and gate unharmed, and how fast.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openai import OpenAI
from rich.console import Console

from demo import tables
from demo.customer import Finished, run_job
from demo.progress import console_of_a_reader, watched
from demo.service import embedded_service

SPLITS = {"train.jsonl": "train.jsonl", "test.jsonl": "validation.jsonl"}
BASE_MODEL = "apothecary-1"


def chat_row(question: str, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def convert(folder: Path, out: Path) -> tuple[Path, Path]:
    """Every row of both splits, unchanged in text; GSM8K's test split becomes the validation file."""
    out.mkdir(parents=True, exist_ok=True)
    for source, target in SPLITS.items():
        rows = [json.loads(line) for line in (folder / source).read_text(encoding="utf-8").split("\n") if line]
        lines = (json.dumps(chat_row(row["question"], row["answer"]), ensure_ascii=False) for row in rows)
        (out / target).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return out / "train.jsonl", out / "validation.jsonl"


def run(folder: Path, console: Console) -> int:
    with embedded_service() as service:
        files = convert(folder, service.home / "gsm8k")
        client = OpenAI(base_url=f"{service.url}/v1", api_key=service.api_key)
        with watched(console) as watch:
            done = run_job(client, files, model=BASE_MODEL, suffix="gsm8k", epochs=1, watch=watch)
        losses = _losses(client, done.job.id)
    _show(console, done, losses)
    return 0 if done.report and losses[-1] < losses[0] else 1


def _losses(client: OpenAI, job_id: str) -> list[float]:
    """Training loss by step, from the job's own events."""
    events = client.fine_tuning.jobs.list_events(job_id, limit=100)
    metrics = [event.data for event in events if event.type == "metrics" and isinstance(event.data, dict)]
    ordered = sorted(metrics, key=lambda data: data["step"])
    return [float(data["train_loss"]) for data in ordered]


def _show(console: Console, done: Finished, losses: Sequence[float]) -> None:
    if not done.report:
        console.print(f"The job ended as {done.job.status}: {done.job.error}")
        return
    training, rows = done.report["training"], done.report["rows"]
    console.print(tables.models_table(done.report, third="candidate"), "")
    console.print(tables.methods_table(done.report), "")
    for name, value in _figures(done, training, rows, losses).items():
        console.print(f"{name:<28} {value}")
    for reason in done.report["reasons"]:
        console.print(f"  {reason['effect']:<7} {reason['text']}")


def _figures(done: Finished, training: Any, rows: Any, losses: Sequence[float]) -> dict[str, str]:
    seconds = done.report["seconds"]
    first, last = losses[: len(losses) // 10 or 1], losses[-(len(losses) // 10 or 1) :]
    return {
        "verdict": f"{done.report['verdict']} (job {done.job.status})",
        "rows trained / held out": f"{rows['training_rows']} / {rows['held_out_rows']}",
        "tokens (real, one epoch)": f"{training['tokens']:,}",
        "training": f"{training['seconds']:.0f} s, {training['tokens'] / training['seconds']:,.0f} tokens/s",
        "loss, first / last tenth": f"{sum(first) / len(first):.3f} / {sum(last) / len(last):.3f}",
        "validation loss": f"{training['full_valid_loss']:.3f}",
        "peak memory of the trainer": f"{done.report['resources']['peak_memory_bytes'] / 2**20:,.0f} MiB",
        "seconds by stage": ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()),
        "whole job": f"{done.seconds:.0f} s",
    }


def main(arguments: list[str]) -> int:
    match arguments:
        case ["convert", folder, out]:
            print(*convert(Path(folder), Path(out)), sep="\n")
            return 0
        case ["run", folder]:
            return run(Path(folder), console_of_a_reader())
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

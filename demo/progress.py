"""The live line under a running job: stage, step, loss, time left.

Knows: the fields of a job that move while it runs.
Refuses to know: how the job is asked after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from openai.types.fine_tuning import FineTuningJob
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

PLAIN_WIDTH = 120  # columns where nobody's terminal says how many there are


def console_of_a_reader() -> Console:
    """As wide as the terminal; wide enough for the tables where the output goes to a file."""
    console = Console()
    return console if console.is_terminal else Console(width=PLAIN_WIDTH)


@contextmanager
def watched(console: Console) -> Iterator[Callable[[FineTuningJob], None]]:
    """Gives the function to call with each fresh view of the job. Without a terminal each stage is one line."""
    columns = (
        TextColumn("  {task.fields[stage]:<12}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
    )
    if not console.is_terminal:
        yield _stage_lines(console)
        return
    with Progress(*columns, console=console, transient=True) as progress:
        line = progress.add_task("", total=1.0, stage="validating", detail="")
        yield lambda job: _move(progress, line, job)


def _stage_lines(console: Console) -> Callable[[FineTuningJob], None]:
    shown: list[str] = []

    def show(job: FineTuningJob) -> None:
        stage = str(getattr(job, "stage", job.status))
        if stage not in shown:
            shown.append(stage)
            console.print(f"  {stage}")

    return show


def _move(progress: Progress, line: TaskID, job: FineTuningJob) -> None:
    now: dict[str, Any] = getattr(job, "progress", None) or {}
    step, total = now.get("step"), now.get("total_steps")
    parts = [f"step {step}/{total}" if step else "", str(now.get("part") or "")]
    parts.append(f"loss {now['train_loss']:.3f}" if now.get("train_loss") is not None else "")
    parts.append(f"about {now['eta_seconds']:.0f} s left" if now.get("eta_seconds") is not None else "")
    share = step / total if step and total else 0.0
    stage = str(getattr(job, "stage", job.status))
    progress.update(line, completed=share, stage=stage, detail="  ".join(part for part in parts if part))

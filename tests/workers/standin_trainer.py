"""A stand-in for `python -m workers.ml run`, for drills: it obeys the same contract and misbehaves on demand.

    python standin_trainer.py <behaviour> <job folder>

It trains nothing. Its "adapter" is a few bytes derived from the seed, its gate report says what the drill asks.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def say(**message: object) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def walk(folder: Path, *, step_seconds: float = 0.02, steps: int = 5) -> None:
    for stage in ("training", "recovering", "gating"):
        say(type="stage", stage=stage)
        for step in range(1, steps + 1):
            say(type="progress", stage=stage, step=step, total_steps=steps, train_loss=1.0 / step, eta_seconds=0.1)
            time.sleep(step_seconds)


def on_sigterm(*_: object) -> None:
    raise SystemExit(143)


def finish(folder: Path, verdict: str) -> None:
    """Leaves what `workers.ml.pipeline` leaves, and says so."""
    candidate = folder / "out" / "gate" / "candidate"
    candidate.mkdir(parents=True, exist_ok=True)
    (candidate / "adapter_config.json").write_text('{"peft_type": "LORA"}\n')
    (candidate / "adapter_model.safetensors").write_bytes(hashlib.sha256(b"weights").digest() * 50_000)
    (candidate / "tokenizer.json").write_text("{}")
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in sorted(candidate.iterdir())]
    reason = {"code": "harmful_score", "effect": "pass" if verdict == "pass" else verdict, "text": "stand-in"}
    report = {"verdict": {"outcome": verdict, "reasons": [reason]}}
    (folder / "out" / "gate" / "report.json").write_text(json.dumps(report))
    (folder / "out" / "train").mkdir(exist_ok=True)
    (folder / "out" / "train" / "result.csv").write_text("step,train_loss\n1,1.0\n")
    say(
        type="result",
        verdict=verdict,
        candidate="out/gate/candidate",
        candidate_digest=hashlib.sha256("".join(lines).encode()).hexdigest(),
        report="out/gate/report.json",
        trained_tokens=1234,
    )


def once(folder: Path) -> bool:
    """True the first time any fence of this job asks."""
    mark = folder.parent / f"{folder.name.split('.')[0]}-was-here"
    first = not mark.exists()
    mark.touch()
    return first


def run_well(behaviour: str, folder: Path) -> bool:
    """Behaviours that end with a verdict, sooner or later. False: it is none of these."""
    match behaviour:
        case "pass":
            say(type="event", level="info", message="resolved", data={"hyperparameters": {"n_epochs": 2}})
            walk(folder)
            finish(folder, "pass")
        case "pass_slowly":
            walk(folder, step_seconds=0.3)
            finish(folder, "pass")
        case "block" | "review" | "error":
            finish(folder, behaviour)
        case "slow_recovering" | "slow_gating":
            slow = behaviour.removeprefix("slow_")
            for stage in ("training", "recovering", "gating"):
                say(type="stage", stage=stage)
                time.sleep(60 if stage == slow else 0)
        case "slow":
            walk(folder, step_seconds=0.5, steps=200)
        case "slow_once":
            if once(folder):
                walk(folder, step_seconds=0.5, steps=10)
            finish(folder, "pass")
        case "die_once":
            say(type="stage", stage="training")
            if once(folder):
                os.kill(os.getpid(), signal.SIGKILL)
            finish(folder, "pass")
        case "environment":
            say(type="result", verdict="pass", environment=dict(os.environ), session=os.getsid(0), pid=os.getpid())
        case _:
            return False
    return True


def lie(behaviour: str, folder: Path) -> bool:
    """Behaviours that say or leave what they must not."""
    match behaviour:
        case "tamper":
            finish(folder, "pass")
            (folder / "out" / "gate" / "candidate" / "adapter_model.safetensors").write_bytes(b"other weights")
        case "escape":
            say(type="result", verdict="pass", candidate="../../..", report="/etc/passwd", candidate_digest="0" * 64)
        case "garbage":
            sys.stdout.write("Loading checkpoint shards: 100%\r\n[1, 2]\nnull\n{}\n")
            sys.stdout.write("x" * (3 << 20) + "\n")
            sys.stdout.flush()
            sys.stdout.buffer.write(b"\xff\xfe\x00\n")
            sys.stdout.flush()
            say(type="result", verdict="pass")
            sys.stderr.write("e" * (4 << 20) + "the end of stderr\n")
        case "silent":
            pass
        case _:
            return False
    return True


def end_badly(behaviour: str) -> None:
    """Behaviours that fail or never end."""
    match behaviour:
        case "hang" | "deaf":
            say(type="stage", stage="training")
            while True:
                time.sleep(3600)
        case "family":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
            say(type="stage", stage="training", grandchild=child.pid)
            time.sleep(3600)
        case "user_error":
            say(type="error", code="user_row_too_long", message="Row 7 has 3,000 tokens.", param="training_file")
            raise SystemExit(42)
        case "retryable":
            say(type="error", code="system_disk_full", message="No space left.", param=None)
            raise SystemExit(75)
        case "bug":
            raise RuntimeError("a bug in the trainer")
        case "confess":
            say(type="error", code="system_bug", message="FileNotFoundError: /srv/theriac/secret", param=None)
            raise SystemExit(1)
        case "suicide":
            say(type="stage", stage="training")
            os.kill(os.getpid(), signal.SIGKILL)
        case other:
            raise SystemExit(f"unknown behaviour {other}")


def main(behaviour: str, folder: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN if behaviour == "deaf" else on_sigterm)
    if not (run_well(behaviour, folder) or lie(behaviour, folder)):
        end_badly(behaviour)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

"""The trainer child: start it, read it, bound it, end it, and know that it is gone.

Knows: processes. A child has its own session and group, dies with the worker (`workers.launch`), speaks JSON
lines on stdout, and leaves a record by which the next worker ends it should anything have survived.
Refuses to know: jobs, leases, storage, and what the lines say beyond their `type`.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import structlog

import workers
from workers import launch
from workers.child_output import BoundedLog, LineReader, parse_message, read_available
from workers.leftovers import oom_kills, write_record

log = structlog.get_logger(__name__)

TICK_SECONDS = 0.1
TRAINER = (sys.executable, "-P", "-m", "workers.ml", "run")
# The exit-code contract of `python -m workers.ml` (after Kubernetes' podFailurePolicy: codes tell fault from bug).
EXIT_USER_ERROR = 42
EXIT_RETRYABLE = 75
EXIT_CANCELLED = 143
# What a child may inherit: where programs, libraries and devices are. No secret of the service is among them.
INHERITED = (
    "PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "NVIDIA_VISIBLE_DEVICES",
    "NVIDIA_DRIVER_CAPABILITIES", "PYTORCH_CUDA_ALLOC_CONF", "VIRTUAL_ENV",
)  # fmt: skip


class Ending(StrEnum):
    """How a run of the child ended, as its worker must treat it."""

    DONE = "done"
    USER_ERROR = "user_error"
    RETRYABLE = "retryable"
    BUG = "bug"
    STOPPED = "stopped"
    TIMED_OUT = "timed_out"


@dataclass(frozen=True, slots=True)
class RunEnd:
    """`error` has code, message, param; `result` is the child's own last word."""

    ending: Ending
    exit_code: int
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class ChildPlan:
    """What to start and under which bounds. `folder` is the child's working and temporary folder."""

    command: tuple[str, ...]
    folder: Path
    record: Path
    threads: int = 1
    stage_timeout_seconds: float = 6 * 3600.0
    grace_seconds: float = 10.0
    memory_limit_bytes: int | None = None


def child_environment(plan: ChildPlan) -> dict[str, str]:
    """A small environment built anew, with a say in threads: docs/decisions/0007 has the measurements."""
    inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}  # room: environ children need PATH
    scratch = plan.folder / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    threads = str(plan.threads)
    environment = inherited | {
        "HOME": str(scratch),
        "TMPDIR": str(scratch),
        "PYTHONPATH": str(Path(workers.__file__).resolve().parent.parent),
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    if plan.threads < _cores():  # it shares the cores, so it must not spin while it waits for its own threads
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    return environment


def threads_per_child(slots: int) -> int:
    """Cores this process may use, divided among the trainings that run side by side.

    An operator's own OMP_NUM_THREADS is a bound for every child.
    """
    share = max(1, _cores() // max(1, slots))
    bound = os.environ.get("OMP_NUM_THREADS", "")  # room: environ the variable is OpenMP's, not a setting of ours
    outermost = bound.partition(",")[0]  # "4,2" bounds nested levels one by one
    return min(share, int(outermost)) if outermost.isdecimal() and int(outermost) else share


def _cores() -> int:
    return len(os.sched_getaffinity(0))


@dataclass(slots=True)
class Child:
    """One running child. Use `start`, then `read` until it returns None, then `finish`."""

    plan: ChildPlan
    process: subprocess.Popen[bytes]
    log: BoundedLog
    selector: selectors.BaseSelector
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    garbage: int = 0
    timed_out: bool = False
    stopping_since: float | None = None
    stage_since: float = field(default_factory=time.monotonic)
    oom_before: int = 0
    _lines: LineReader = field(default_factory=LineReader)

    @classmethod
    def start(cls, plan: ChildPlan) -> Child:
        # The kernel sends the death signal when the *thread* that started the child ends, so a thread of a
        # pool would take a healthy trainer with it.
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("a child that dies with its parent may only be started by the main thread")
        limit = str(plan.memory_limit_bytes or 0)
        launcher = (sys.executable, "-S", "-E", str(Path(launch.__file__).resolve()), str(os.getpid()), limit, "--")
        process = subprocess.Popen(
            [*launcher, *plan.command],
            cwd=plan.folder,
            env=child_environment(plan),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        selector = selectors.DefaultSelector()
        try:
            write_record(plan.record, process.pid, plan.folder)
            for stream, name in ((process.stdout, "stdout"), (process.stderr, "stderr")):
                assert stream is not None
                os.set_blocking(stream.fileno(), False)
                selector.register(stream, selectors.EVENT_READ, name)
            return cls(plan, process, BoundedLog(plan.folder / "trainer.log"), selector, oom_before=oom_kills())
        except BaseException:
            # A full disk, for instance: nobody holds the child yet, so nobody else would end it.
            _end(process, selector)
            plan.record.unlink(missing_ok=True)
            raise

    def read(self, timeout: float = TICK_SECONDS) -> list[dict[str, Any]] | None:
        """Messages that arrived, at most `timeout` late; None when the child is gone and all is read."""
        self._enforce_bounds()
        messages: list[dict[str, Any]] = []
        ready = self.selector.select(timeout) if self.selector.get_map() else []
        for key, _ in ready:
            data = read_available(key.fileobj)  # type: ignore[arg-type]
            if data is None:
                self.selector.unregister(key.fileobj)
            elif key.data == "stderr":
                self.log.write(data)
            else:
                messages += self._parse(self._lines.feed(data))
        if not self._exited():
            if not ready and not self.selector.get_map():
                time.sleep(timeout)
            return messages
        self.kill()  # a grandchild could hold the pipes open for ever; the child's own words are all in them
        if ready and self.selector.get_map():
            return messages
        messages += self._parse(self._lines.rest())
        return messages or None

    def _exited(self) -> bool:
        """Without reaping: until `finish` the pid, and so the group's number, cannot be given to anybody else."""
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def stop(self) -> None:
        """Asks the group to end; `read` kills it when the grace is over."""
        if self.stopping_since is None:
            self.stopping_since = time.monotonic()
            self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends the group now. Safe from any thread."""
        self._signal(signal.SIGKILL)

    def finish(self) -> RunEnd:
        """Ends whatever is left of the group, closes everything, and says how it went."""
        exit_code = _end(self.process, self.selector)
        self.log.close()
        self.plan.record.unlink(missing_ok=True)
        if self.garbage or self._lines.oversized:
            log.warning("trainer.unreadable_lines", garbage=self.garbage, oversized=self._lines.oversized)
        return self._judge(exit_code)

    def _judge(self, code: int) -> RunEnd:
        if self.timed_out:
            message = f"A stage took longer than {self.plan.stage_timeout_seconds:.0f} s."
            return RunEnd(Ending.TIMED_OUT, code, error=fault("system_stage_timeout", message))
        if self.stopping_since is not None and not (code == 0 and self.result):
            return RunEnd(Ending.STOPPED, code)
        if code == 0 and self.result is not None:
            return RunEnd(Ending.DONE, code, result=self.result)
        if code == 0:
            message = "The trainer ended without a result."
            return RunEnd(Ending.BUG, code, error=fault("system_trainer_protocol", message))
        if code == EXIT_USER_ERROR:
            return RunEnd(Ending.USER_ERROR, code, error=self.error or fault("user_error", "The data were refused."))
        if code == EXIT_RETRYABLE:
            return RunEnd(Ending.RETRYABLE, code, error=self.error or fault("system_error", "A system fault."))
        if code < 0 or code == EXIT_CANCELLED:
            return RunEnd(Ending.RETRYABLE, code, error=self._died_by_signal(code))
        return RunEnd(Ending.BUG, code, error=self.error or fault("system_error", f"The trainer ended with {code}."))

    def _died_by_signal(self, code: int) -> dict[str, Any]:
        if code == -signal.SIGKILL and oom_kills() > self.oom_before:
            return fault("system_out_of_memory", "The machine ran out of memory and ended the trainer.")
        name = signal.Signals(-code).name if code < 0 else "SIGTERM"
        return fault("system_trainer_killed", f"The trainer was ended by {name}.")

    def _enforce_bounds(self) -> None:
        now = time.monotonic()
        if self.stopping_since is not None and now - self.stopping_since > self.plan.grace_seconds:
            self.kill()
        if self.stopping_since is None and now - self.stage_since > self.plan.stage_timeout_seconds:
            self.timed_out = True
            self.stop()

    def _parse(self, lines: list[bytes]) -> list[dict[str, Any]]:
        messages = []
        for line in lines:
            message = parse_message(line)
            if message is None:
                self.garbage += 1
                continue
            if message["type"] == "result":
                self.result = message
            elif message["type"] == "error":
                self.error = {key: message.get(key) for key in ("code", "message", "param")}
            elif message["type"] == "stage":
                self.stage_since = time.monotonic()
            messages.append(message)
        return messages

    def _signal(self, number: signal.Signals) -> None:
        _signal_group(self.process, number)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _end(process: subprocess.Popen[bytes], selector: selectors.BaseSelector) -> int:
    _signal_group(process, signal.SIGKILL)
    exit_code = process.wait()
    selector.close()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()
    return exit_code


def fault(code: str, message: str, param: str | None = None) -> dict[str, Any]:
    return {"code": code, "message": message, "param": param}


def trainer_command(configured: Sequence[str] | None, folder: Path) -> tuple[str, ...]:
    """The pipeline, or what the operator wraps around it (or a drill puts in its place); the folder comes last."""
    return (*(configured or TRAINER), str(folder))


def recorded_environment(plan: ChildPlan) -> Mapping[str, str]:
    """The part of the child's environment that can change a result or its speed, for the job's record."""
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES")
    environment = child_environment(plan)
    return {name: environment[name] for name in names if name in environment}

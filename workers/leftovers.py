"""Processes by record: who was started by whom, and ending what outlived its worker.

Knows: that a pid alone names nobody for long; with its start time and the boot it names one process for ever.
Refuses to know: what the processes do.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)


def oom_kills() -> int:
    """How often the kernel ended a process of our cgroup for memory (version 2, then 1); 0 where unknown."""
    for name in ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"):
        with contextlib.suppress(OSError, ValueError):
            for line in Path(name).read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0


def process_started(pid: int) -> int | None:
    """The kernel's start time of a process in clock ticks; with the pid it names a process uniquely per boot."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])


def pid_space() -> str:
    """Where pids mean the same: this boot of this machine, and this container."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"


def write_record(path: Path, pid: int, folder: Path) -> None:
    """Who was started by whom; read by `end_leftovers` should we not live to remove it."""
    record = {
        "pid": pid,
        "started": process_started(pid),
        "owner": os.getpid(),
        "owner_started": process_started(os.getpid()),
        "space": pid_space(),
        "folder": str(folder),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record))
    temporary.rename(path)


def end_leftovers(folder: Path) -> None:
    """Ends children whose worker is gone, by record (pid and start time), never by name.

    A record from another container (workers may share a volume) or from before a reboot says nothing about the
    pids here; it goes when its folder is gone.
    """
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text())
            pid, started = int(record["pid"]), record["started"]
            owner, owner_started = int(record["owner"]), record["owner_started"]
            here, scratch = record["space"] == pid_space(), Path(record["folder"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("leftover.unreadable_record", path=str(path), error=repr(error))
            path.unlink(missing_ok=True)
            continue
        if not here:
            if not scratch.exists():
                path.unlink(missing_ok=True)
            continue
        if process_started(owner) == owner_started:
            continue
        if started is not None and process_started(pid) == started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            log.warning("leftover.ended", pid=pid, folder=str(scratch))
        path.unlink(missing_ok=True)

"""Processes by record: who was started by whom, and ending what outlived its worker.

Knows: that a pid alone names nobody for long; with its start time and the boot it names one process for ever.
Refuses to know: what the processes do.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Process:
    """A live process as the kernel shows it; `started` in clock ticks since the boot."""

    group: int
    session: int
    started: int


def look_at(pid: int | str) -> Process | None:
    """None when there is no such process, or only what its parent has not yet buried."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, _parent, group, session, *rest = stat.rpartition(")")[2].split()
    return None if state == "Z" else Process(int(group), int(session), int(rest[15]))


def process_started(pid: int) -> int | None:
    """The kernel's start time of a process; with the pid it names a process uniquely per boot."""
    process = look_at(pid)
    return process.started if process else None


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
    """Ends children whose worker is gone, and theirs, by record (pid and start time), never by name.

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
        for group in _groups_left(pid, started, scratch):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
            log.warning("leftover.ended", pid=pid, group=group, folder=str(scratch))
        path.unlink(missing_ok=True)


def _groups_left(leader: int, started: int | None, folder: Path) -> set[int]:
    """The process groups of the session that a child led.

    The kernel's death signal reaches the child alone, so the child may be gone while what it started (a wrapper's
    trainer) goes on in its session. A session's number is given to no other process while anybody is in it, so a
    stranger's process under it means that nothing of ours is left; without a leader, the members must be younger
    than ours was and show our folder.
    """
    now = process_started(leader)
    if now not in {None, started}:
        return set()
    members = {entry: look_at(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    return {
        process.group
        for entry, process in members.items()
        if process is not None
        and process.session == leader
        and (now is not None or (process.started >= (started or 0) and _shows(entry, folder)))
    }


def _shows(entry: Path, folder: Path) -> bool:
    """Whether a process works in the folder or was given it: in its environment (HOME, TMPDIR) or as an argument."""
    try:
        given = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
        return os.fsencode(folder) in given or (entry / "cwd").readlink().is_relative_to(folder.resolve())
    except OSError:
        return False

"""The trainer child: every way it can end, and that nothing of it remains. Real processes, a stand-in program."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from workers import leftovers, supervisor
from workers.child_output import BoundedLog, LineReader
from workers.supervisor import Child, ChildPlan, Ending, RunEnd, child_environment, threads_per_child

STANDIN = Path(__file__).with_name("standin_trainer.py")


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., ChildPlan]:
    def make(behaviour: str, **bounds: Any) -> ChildPlan:
        folder = tmp_path / "job"
        folder.mkdir(exist_ok=True)
        command = (sys.executable, str(STANDIN), behaviour, str(folder))
        return ChildPlan(command, folder, tmp_path / "run" / "job.json", **bounds)

    return make


def run(plan: ChildPlan) -> tuple[RunEnd, list[dict[str, Any]]]:
    child, heard = Child.start(plan), []
    while (messages := child.read()) is not None:
        heard += messages
    return child.finish(), heard


def gone(pid: int, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if leftovers.process_started(pid) is None:
            return True
        time.sleep(0.02)
    return False


def wait_for(child: Child, kind: str) -> dict[str, Any]:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for message in child.read() or []:
            if message["type"] == kind:
                return message
    raise AssertionError(f"no {kind} message")


def test_a_good_run_is_heard_from_stage_to_result(plan):
    end, heard = run(plan("pass"))
    assert end.ending is Ending.DONE
    assert end.result["verdict"] == "pass"
    assert [m["stage"] for m in heard if m["type"] == "stage"] == ["training", "recovering", "gating"]
    assert len([m for m in heard if m["type"] == "progress"]) == 15


@pytest.mark.parametrize(
    ("behaviour", "ending", "code"),
    [
        ("user_error", Ending.USER_ERROR, "user_row_too_long"),
        ("retryable", Ending.RETRYABLE, "system_disk_full"),
        ("bug", Ending.BUG, "system_error"),
        ("silent", Ending.BUG, "system_trainer_protocol"),
        ("suicide", Ending.RETRYABLE, "system_trainer_killed"),
    ],
)
def test_each_bad_end_has_its_own_name(plan, behaviour, ending, code):
    end, _ = run(plan(behaviour))
    assert (end.ending, end.error["code"]) == (ending, code)


def test_a_program_that_does_not_exist_is_a_bug_not_a_crash(plan, tmp_path):
    end, _ = run(ChildPlan(("/no/such/program",), tmp_path, tmp_path / "run" / "x.json"))
    assert end.ending is Ending.BUG
    assert end.exit_code == 126


def test_garbage_and_endless_lines_do_not_hurt(plan):
    chosen = plan("garbage")
    end, heard = run(chosen)
    assert end.ending is Ending.DONE
    assert [m["type"] for m in heard] == ["result"]
    log = (chosen.folder / "trainer.log").read_bytes()
    assert len(log) < 1.2 * (1 << 20), "4 MiB of stderr leave a bounded log"
    assert log.rstrip().endswith(b"the end of stderr")
    assert b"bytes left out" in log


def test_a_polite_child_stops_when_asked(plan):
    child = Child.start(plan("slow"))
    wait_for(child, "progress")
    child.stop()
    started = time.monotonic()
    while child.read() is not None:
        pass
    end = child.finish()
    assert (end.ending, end.exit_code) == (Ending.STOPPED, 143)
    assert time.monotonic() - started < 3


def test_a_deaf_child_is_killed_after_the_grace(plan):
    child = Child.start(plan("deaf", grace_seconds=0.5))
    wait_for(child, "stage")
    child.stop()
    started = time.monotonic()
    while child.read() is not None:
        pass
    assert child.finish().ending is Ending.STOPPED
    assert 0.4 < time.monotonic() - started < 3


def test_a_hanging_stage_meets_its_timeout(plan):
    end, _ = run(plan("hang", stage_timeout_seconds=0.5, grace_seconds=0.5))
    assert end.ending is Ending.TIMED_OUT
    assert end.error["code"] == "system_stage_timeout"


def test_grandchildren_end_with_the_child(plan):
    child = Child.start(plan("family", grace_seconds=0.3))
    grandchild = wait_for(child, "stage")["grandchild"]
    child.stop()
    while child.read() is not None:
        pass
    child.finish()
    assert gone(child.process.pid)
    assert gone(grandchild)


def test_a_child_that_cannot_be_recorded_is_ended_at_once(plan, monkeypatch):
    started: list[int] = []

    def full(_path: Path, pid: int, _folder: Path) -> None:
        started.append(pid)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(supervisor, "write_record", full)
    with pytest.raises(OSError, match="No space"):
        Child.start(plan("deaf"))
    assert not Path(f"/proc/{started[0]}").exists(), "ended and buried"


def test_a_child_whose_log_cannot_be_opened_leaves_no_record(plan):
    chosen = plan("deaf")
    (chosen.folder / "trainer.log").mkdir()
    with pytest.raises(IsADirectoryError):
        Child.start(chosen)
    assert list(chosen.record.parent.iterdir()) == []


def test_the_environment_is_small_and_bounds_threads(plan, monkeypatch):
    monkeypatch.setenv("THERIAC_STORAGE__SECRET_ACCESS_KEY", "canary")
    end, _ = run(plan("environment", threads=3))
    seen = end.result["environment"]
    assert seen["OMP_NUM_THREADS"] == "3"
    assert seen["HF_HUB_OFFLINE"] == "1"
    assert "canary" not in json.dumps(seen)
    assert end.result["session"] == end.result["pid"], "the child leads a session of its own"


def test_the_memory_limit_holds(plan, tmp_path):
    hog = (sys.executable, "-c", "x = bytearray(2 << 30)")
    end, _ = run(ChildPlan(hog, tmp_path, tmp_path / "run" / "x.json", memory_limit_bytes=512 << 20))
    assert end.ending is Ending.BUG
    assert b"MemoryError" in (tmp_path / "trainer.log").read_bytes()


def test_cores_are_divided_among_slots(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert threads_per_child(1) == cores
    assert threads_per_child(10 * cores) == 1


@pytest.mark.parametrize(("bound", "threads"), [("1", 1), ("1,2", 1), ("1000000", None), ("0", None), ("", None)])
def test_an_operators_thread_bound_holds_for_children(monkeypatch, bound, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", bound)
    assert threads_per_child(1) == (threads or len(os.sched_getaffinity(0)))


def test_only_a_child_with_every_core_spins_while_it_waits(plan, monkeypatch):
    monkeypatch.setattr(supervisor, "_cores", lambda: 4)
    assert "OMP_WAIT_POLICY" not in child_environment(plan("environment", threads=4))
    assert child_environment(plan("environment", threads=2))["OMP_WAIT_POLICY"] == "PASSIVE"


def test_only_the_main_thread_may_start_a_child(plan):
    raised: list[BaseException] = []

    def start() -> None:
        try:
            Child.start(plan("pass"))
        except RuntimeError as error:
            raised.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert "main thread" in str(raised[0])


def test_the_child_dies_with_a_killed_parent(plan, tmp_path):
    chosen = plan("deaf")
    script = f"""
        import sys, time
        from pathlib import Path
        from workers.supervisor import Child, ChildPlan
        child = Child.start(ChildPlan({chosen.command!r}, Path({str(chosen.folder)!r}), Path({str(chosen.record)!r})))
        while not child.read(): pass
        print(child.process.pid, flush=True)
        time.sleep(3600)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert leftovers.process_started(pid) is not None
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(pid, 2.0)
    leftovers.end_leftovers(chosen.record.parent)
    assert not chosen.record.exists()


def test_a_leftover_is_ended_by_its_record(tmp_path):
    orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=True)
    leftovers.write_record(tmp_path / "run" / "a.json", orphan.pid, tmp_path / "scratch")
    record = json.loads((tmp_path / "run" / "a.json").read_text())
    record |= {"owner": 2**22 + 1, "owner_started": 1}
    (tmp_path / "run" / "a.json").write_text(json.dumps(record))
    leftovers.end_leftovers(tmp_path / "run")
    assert orphan.wait(5) == -signal.SIGKILL


@pytest.fixture
def orphan(tmp_path: Path) -> Iterator[Callable[..., tuple[int, Path]]]:
    """A process whose session's leader, recorded, is dead; returns its pid and the record of a dead worker."""
    pids: list[int] = []

    def make(folder: Path, *, own_group: bool = False) -> tuple[int, Path]:
        start = "set -m; " if own_group else ""
        leader = subprocess.Popen(
            ["bash", "-c", f"{start}sleep 3600 >/dev/null & echo $!; wait"],
            stdout=subprocess.PIPE, text=True, start_new_session=True, cwd=folder,
        )  # fmt: skip
        pids.append(int(leader.stdout.readline()))
        record = tmp_path / "run" / "a.json"
        leftovers.write_record(record, leader.pid, tmp_path / "scratch")
        leader.kill()
        leader.wait()
        leader.stdout.close()
        record.write_text(json.dumps(json.loads(record.read_text()) | {"owner": 2**22 + 1, "owner_started": 1}))
        return pids[-1], record

    (tmp_path / "scratch").mkdir()
    yield make
    for pid in pids:
        if leftovers.process_started(pid) is not None:
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("own_group", [False, True])
def test_what_a_dead_wrapper_started_is_ended_too(orphan, tmp_path, own_group):
    pid, record = orphan(tmp_path / "scratch", own_group=own_group)
    leftovers.end_leftovers(record.parent)
    assert gone(pid)
    assert not record.exists()


def test_a_strangers_orphan_under_a_recycled_number_is_left_alone(orphan, tmp_path):
    pid, record = orphan(tmp_path)
    leftovers.end_leftovers(record.parent)
    assert leftovers.process_started(pid) is not None
    pid, record = orphan(tmp_path / "scratch")
    later = leftovers.process_started(pid) + 1
    record.write_text(json.dumps(json.loads(record.read_text()) | {"started": later}))
    leftovers.end_leftovers(record.parent)
    assert leftovers.process_started(pid) is not None


def test_a_recycled_pid_is_never_ended(tmp_path):
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=True)
    leftovers.write_record(tmp_path / "run" / "a.json", stranger.pid, tmp_path)
    record = json.loads((tmp_path / "run" / "a.json").read_text())
    record |= {"owner": 2**22 + 1, "owner_started": 1, "started": record["started"] - 1}
    (tmp_path / "run" / "a.json").write_text(json.dumps(record))
    leftovers.end_leftovers(tmp_path / "run")
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_the_children_of_a_live_worker_are_left_alone(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=True)
    leftovers.write_record(tmp_path / "run" / "a.json", child.pid, tmp_path)
    leftovers.end_leftovers(tmp_path / "run")
    assert child.poll() is None
    child.kill()
    child.wait()


def test_an_unreadable_record_is_removed(tmp_path):
    (tmp_path / "a.json").write_text("{half a rec")
    leftovers.end_leftovers(tmp_path)
    assert not (tmp_path / "a.json").exists()


def test_a_record_of_another_container_says_nothing_about_the_pids_here(tmp_path):
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=True)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    path = tmp_path / "run" / "a.json"
    leftovers.write_record(path, stranger.pid, scratch)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"space": "elsewhere", "owner": 2**22 + 1}))
    leftovers.end_leftovers(path.parent)
    assert stranger.poll() is None
    assert path.exists()
    scratch.rmdir()
    leftovers.end_leftovers(path.parent)
    assert not path.exists()
    stranger.kill()
    stranger.wait()


def test_lines_are_cut_at_newlines_only_and_across_reads():
    reader = LineReader(limit_bytes=10)
    assert reader.feed(b"ab") == []
    assert reader.feed(b"c\nd\xe2\x80\xa8e\n\n") == [b"abc", b"d\xe2\x80\xa8e"]
    assert reader.feed(b"0123456789012\nnext\n") == [b"next"]
    assert reader.oversized == 1
    assert reader.feed(b"rest") == []
    assert reader.rest() == [b"rest"]


def test_a_log_keeps_the_beginning_and_the_end(tmp_path):
    log = BoundedLog(tmp_path / "log", head_bytes=5, tail_bytes=4)
    for piece in (b"abc", b"defg", b"hijk", b"lmno"):
        log.write(piece)
    log.close()
    assert (tmp_path / "log").read_bytes() == "abcde\n… 6 bytes left out …\nlmno".encode()

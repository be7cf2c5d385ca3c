"""The first instructions of every child a worker starts; then the child becomes the real program.

    python -S -E launch.py <parent's pid> <memory limit in bytes, or 0> -- program arguments…

Knows: how a child promises to die with its parent, and its memory limit. This is a program of its own, not a
`preexec_fn`, because code between fork and exec of a process that has threads may deadlock.
Refuses to know: what the program does. Standard library only, no import of ours, so that it starts in
milliseconds.
"""

import ctypes
import os
import resource
import signal
import sys

PR_SET_PDEATHSIG = 1
CANNOT_EXECUTE = 126


def main(arguments: list[str]) -> None:
    parent, memory_limit, separator, *program = arguments
    assert separator == "--", "usage: launch.py PARENT LIMIT -- PROGRAM ARGUMENTS…"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"launch: prctl failed: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != int(parent):
        sys.exit("launch: the parent died before its child could start")
    if int(memory_limit):
        resource.setrlimit(resource.RLIMIT_AS, (int(memory_limit), int(memory_limit)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold customers' rows
    # A worker under a service manager may have these blocked or ignored; the program must hear them.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(program[0], program)  # noqa: S606 - no shell is wanted between us and the program
    except OSError as error:
        sys.stderr.write(f"launch: {program[0]}: {error.strerror}\n")
        sys.exit(CANNOT_EXECUTE)


if __name__ == "__main__":
    main(sys.argv[1:])

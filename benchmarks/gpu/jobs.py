"""Runs commands, each in a process group of its own with a timeout, several at once where asked.

A crash, a hang or a wrong answer costs what was being done its line, and nothing else: what a process tells of itself
(:mod:`benchmarks.gpu.child`) says what that was, and what it has not done yet is done by another process.
"""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu import child
from benchmarks.gpu.lines import Status

ROOT = Path(__file__).resolve().parents[2]
#: After this, a process that does not even end when killed (a driver may hold it) is left behind.
LAST_WAIT = 3.0
#: Of the pipes of a process that has ended: somebody else may hold them.
_PIPE_SECONDS = 1.0
#: Of a process's output, what is kept to explain its end.
_TAIL = 4000

#: What was done with a name: a status, and figures.
Heard = Callable[[str, str, dict[str, Any]], None]


@dataclass(frozen=True)
class Job:
    """A command, and how long it may take.

    A process may take ``limit`` seconds, and ``item_limit`` for each of the things that it says it does; what it waits
    for others does not count. With less than ``least`` seconds left it is not started. What its output says goes into
    the file ``output``, or the log.
    ``line`` says that it has a line of its own even if all is well.
    """

    name: str
    command: Sequence[str]
    limit: float
    item_limit: float = math.inf
    least: float = 5.0
    environment: Mapping[str, str] = field(default_factory=dict)
    output: Path | None = None
    line: bool = True


#: Characters of a log that are kept of a job, and of all of them: what comes back from elsewhere is limited.
MOST_OF_JOB, MOST_OF_LOG = 256 << 10, 12 << 20


class Log:
    """The output of all processes, each line with the name of its job, on the disk when it is known.

    Of a job that says too much only the beginning is kept, and how it ended.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[Path, IO[str]] = {}
        self._written: dict[str, int] = {}

    def write(self, job: Job, text: str, is_end: bool = False) -> None:
        path = job.output or self.path
        before = self._written.get(job.name, 0)
        room = min(MOST_OF_JOB - before, MOST_OF_LOG - sum(self._written.values()))
        if len(text) > room and not is_end:
            if before < MOST_OF_JOB:
                self._written[job.name] = MOST_OF_JOB
                self.write(job, "=== the rest is not kept", is_end=True)
            return
        self._written[job.name] = before + len(text)
        if path not in self._files:
            self._files[path] = path.open("a", errors="replace")
        begin = f"{job.name} | " if job.output is None else ""
        self._files[path].write("".join(f"{begin}{line}\n" for line in text.splitlines()))
        self._files[path].flush()


#: Groups of the processes that run now.
running: set[int] = set()


def kill_all() -> None:
    for group in list(running):
        _kill(group)


def _kill(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def run(jobs: Sequence[Job], until: float, heard: Heard, log: Log, at_once: int = 1) -> None:
    """Runs the jobs, and returns by ``until`` (of time.monotonic()), or ``LAST_WAIT`` later if processes do not die.

    ``heard`` is told of everything that was done, or planned and not done; and of each job that was not started.
    """
    waiting = list(jobs)
    active: list[_Process] = []
    awake = threading.Event()  # somebody has said something
    try:
        while waiting or active:
            while waiting and len(active) < at_once:
                job = waiting.pop(0)
                if until - time.monotonic() < job.least:
                    heard(job.name, Status.NOT_RUN, {"reason": "no time was left"})
                else:
                    active.append(_Process(job, _State(), until, heard, log, awake))
            awake.wait(0.1)
            awake.clear()
            for process in list(active):
                process.listen()
                if process.is_over():
                    active.remove(process)
                    again = process.finish()
                    if again is not None and until - time.monotonic() >= process.job.least:
                        active.append(_Process(process.job, again, until, heard, log, awake))
                    elif again is not None:
                        again.leave(heard, "no time was left")
    finally:
        for process in active:
            process.kill("was ended")
        for process in active:
            process.leave()


@dataclass
class _State:
    """What is known of a job, over all of its processes."""

    planned: list[str] = field(default_factory=list)
    done: set[str] = field(default_factory=set)
    #: Have a line that counts, if no other one comes.
    provisional: set[str] = field(default_factory=set)

    def leave(self, heard: Heard, why: str) -> None:
        for name in self.planned:
            if name not in self.done | self.provisional:
                heard(name, Status.NOT_RUN, {"reason": why})


class _Process:
    """One process of a job."""

    def __init__(self, job: Job, state: _State, until: float, heard: Heard, log: Log, awake: threading.Event) -> None:
        self.job, self.state = job, state
        self._heard, self._log, self._awake = heard, log, awake
        # Who says too much at once has to wait.
        self._lines: queue.Queue[tuple[Callable[[str], None], str]] = queue.Queue(10_000)
        self._begun: str | None = None
        self._figures: dict[str, Any] = {}  # of what was begun
        self._progress = False
        self._waits_since: float | None = None
        self._killed: str | None = None  # why
        self._killed_at = 0.0
        self._status = Status.TIMEOUT  # of what is killed
        self._tail = ""
        log.write(job, f"=== {job.name}: {' '.join(job.command)[:500]}")
        told, records = os.pipe()
        with tempfile.TemporaryFile() as done:
            done.write(json.dumps(sorted(state.done)).encode())
            done.seek(0)
            self._process = subprocess.Popen(
                job.command,
                cwd=ROOT,
                env={
                    **os.environ,
                    "PYTHONUNBUFFERED": "1",
                    **job.environment,
                    child.VARIABLE: str(records),
                    child.DONE_VARIABLE: str(done.fileno()),
                },
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[records, done.fileno()],
                start_new_session=True,
            )
        running.add(self._process.pid)
        os.close(records)
        assert self._process.stdout is not None
        self._readers = (
            self._reader(self._process.stdout, self._said),
            self._reader(os.fdopen(told, "rb"), self._told),
        )
        self._began = self._item_began = time.monotonic()
        self._until = until

    def _reader(self, pipe: IO[bytes], handle: Callable[[str], None]) -> threading.Thread:
        def follow() -> None:
            with pipe:
                for line in pipe:
                    self._lines.put((handle, line.decode(errors="replace").removesuffix("\n")))
                    self._awake.set()

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        return thread

    def listen(self) -> None:
        """Handles what has been said by now; who goes on talking is timed in between."""
        for _ in range(self._lines.qsize()):
            handle, line = self._lines.get()
            handle(line)

    def _said(self, line: str) -> None:
        self._tail = (self._tail + line + "\n")[-_TAIL:]
        self._log.write(self.job, line)

    def _told(self, line: str) -> None:
        try:
            record = json.loads(line)
        except ValueError:  # it died while it wrote
            return
        now = time.monotonic()
        if "waits" in record:
            if self._waits_since is not None:
                self._began += now - self._waits_since
                self._item_began += now - self._waits_since
            self._waits_since = now if record["waits"] else None
            return
        self._item_began = now
        if "plan" in record:
            self.state.planned = list(dict.fromkeys([*self.state.planned, *record["plan"]]))
        elif "begin" in record:
            self._begun = record.pop("begin")
            self._figures = record
        else:
            name, status = record.pop("name"), record.pop("status")
            self._begun = None
            if record.get("provisional"):
                self.state.provisional.add(name)
            else:
                self._progress = True
                self.state.done.add(name)
            self._heard(name, status, record)

    def is_over(self) -> bool:
        """Whether it has ended, or has not although it was killed; kills it if its time is over."""
        if self._process.poll() is not None:
            return True
        now = time.monotonic()
        if self._killed is not None:
            if now > self._killed_at + LAST_WAIT:
                self._killed += ", and does not die"
                return True
        elif now > self._until:
            self._status = Status.NOT_RUN
            self.kill("ended when no time was left")
        elif self._waits_since is not None:
            pass
        elif now - self._began > self.job.limit:
            self.kill(f"did not end within {self.job.limit:.0f} s")
        elif self._begun is not None and now - self._item_began > self.job.item_limit:
            self.kill(f"did not end within {self.job.item_limit:.0f} s")
        return False

    def kill(self, why: str) -> None:
        self._killed, self._killed_at = why, time.monotonic()
        _kill(self._process.pid)

    def leave(self) -> None:
        """Waits for a process that was killed, and forgets it."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, self._killed_at + LAST_WAIT - time.monotonic()))
        running.discard(self._process.pid)

    def finish(self) -> _State | None:
        """Tells of the end; returns the state to go on with in another process, if something is left that it can do."""
        _kill(self._process.pid)  # what it has started and left behind
        running.discard(self._process.pid)
        end_of_pipes = time.monotonic() + _PIPE_SECONDS
        while any(reader.is_alive() for reader in self._readers) and time.monotonic() < end_of_pipes:
            self.listen()
            time.sleep(0.001)
        self.listen()
        seconds = round(time.monotonic() - self._began, 2)
        code = self._process.returncode
        status, reason = self._end(code)
        end = f"=== {self.job.name}: {status}{f', {reason}' if reason else ''}, {seconds} s"
        self._log.write(self.job, end, is_end=True)
        figures = {"reason": reason, "seconds": seconds}
        is_item = self._begun is not None
        if self._begun is not None:
            self.state.done.add(self._begun)
            if status is not Status.NOT_RUN or self._begun not in self.state.provisional:
                self._heard(self._begun, status, {**figures, **self._figures})
        left = [name for name in self.state.planned if name not in self.state.done]
        if left and (is_item or self._progress) and status is not Status.NOT_RUN:
            return self.state
        if left:
            self.state.leave(self._heard, reason or "was not done")
        if not is_item and (status is not Status.OK or self.job.line) and code != child.STICKY:
            self._heard(self.job.name, status, {k: v for k, v in figures.items() if v is not None})
        return None

    def _end(self, code: int | None) -> tuple[Status, str | None]:
        if self._killed is not None:
            return self._status, self._killed
        if code == 0:
            return Status.OK, None
        if code == child.STICKY:
            return Status.ERROR, "the GPU is lost to this process"
        said = next((line.strip() for line in reversed(self._tail.splitlines()) if _says_something(line)), "")
        if code is not None and code < 0:
            return Status.CRASHED, f"{signal.Signals(-code).name}{f': {said[:300]}' if said else ''}"
        return Status.ERROR, f"status {code}{f': {said[:300]}' if said else ''}"


_FAULT_HANDLER = ("Extension modules:", 'File "', "Current thread 0x", "Thread 0x", "<no Python frame>")


def _says_something(line: str) -> bool:
    """Unlike what Python's handler of faults ends with."""
    return bool(line.strip()) and not line.lstrip().startswith(_FAULT_HANDLER)

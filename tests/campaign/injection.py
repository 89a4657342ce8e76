"""Faults at exact system calls: programs run with wrapped file functions that kill, signal or fail at the n-th call.

The wrappers count the calls that concern files below one folder: opening for writing, writing, synchronising, renaming,
linking, removing and making folders. Files are written through raw Python objects, so that a fault can strike in the
middle of a write, as a kill or a full disk does.
"""

import builtins
import errno
import io
import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from tests.processes import run_words

WRITING = set("wax+")


@dataclass(frozen=True)
class Plan:
    """What goes wrong.

    Attributes:
        folder: only calls that concern this folder or a file below it count.
        call: number of the call at which it happens, from 0; -1: never.
        when: "before" or "after" the call, or "within" it: half of what is to be written is written.
        signal: signal that the process sends to itself; 0: none.
        error: error number with which the call fails; 0: none.
        shell: command that a shell runs at the call; "": none.
        keeps_failing: all later calls of the same function fail too.
        room: bytes that can be written in total before the disk is full; -1: any number.
        log: file that receives the name and path of each counted call; "": none.
    """

    folder: str
    call: int = -1
    when: str = "before"
    signal: int = 0
    error: int = 0
    shell: str = ""
    keeps_failing: bool = False
    room: int = -1
    log: str = ""


def run_with_fault(plan: dict[str, Any], *words: str) -> None:
    """Do what `python words...` does, with a fault. The process must have been forked for this."""
    Injector(Plan(**plan)).install()
    run_words(*words)


def as_arguments(plan: Plan) -> dict[str, Any]:
    return asdict(plan)


class Injector:
    """Counts calls and breaks one of them."""

    def __init__(self, plan: Plan):
        self.plan, self.calls, self.room = plan, 0, plan.room
        self.process = os.getpid()
        self.files: dict[int, str] = {}  # descriptors that `os.open` returned, and their paths
        self.failing = ""
        self.real = {name: getattr(os, name) for name in ("kill", "write", "open")}
        self.real_open = io.open

    def install(self) -> None:
        """Wrap the functions in this process."""
        for name in ("replace", "rename", "link", "symlink", "unlink", "remove", "mkdir", "rmdir", "truncate"):
            self._wrap_os(name, lambda *words: self._path(words[0]))
        for name in ("fsync", "fdatasync", "ftruncate", "close"):
            self._wrap_os(name, lambda number, *_: self.files.get(number, ""))
        self._wrap_os("open", lambda path, *_: self._path(path), self._remember)
        self._wrap_os("write", lambda number, _: self.files.get(number, ""), self._write)
        self._wrap_os("sendfile", lambda to, *_: self.files.get(to, ""))
        io.open = builtins.open = self._open

    def _wrap_os(self, name: str, path_of: Callable[..., str], call: Callable | None = None) -> None:
        real = getattr(os, name)
        perform = real if call is None else (lambda *words, **named: call(real, *words, **named))

        def wrapped(*words: Any, **named: Any) -> Any:
            path = path_of(*words)
            if not path:
                return perform(*words, **named)
            return self._reach(name, path, lambda: perform(*words, **named))

        setattr(os, name, wrapped)

    def _remember(self, real: Callable, path: Any, flags: int, *rest: Any, **named: Any) -> int:
        number = real(path, flags, *rest, **named)
        if flags & (os.O_WRONLY | os.O_RDWR):
            self.files[number] = self._path(path)
        return number

    def _write(self, real: Callable, number: int, content: Any) -> int:
        path = self.files.get(number)
        return real(number, self._that_fits(content, path) if path else content)

    def _path(self, path: Any) -> str:
        """Return the absolute path if it is in the folder of the plan, else ""."""
        if isinstance(path, int) or os.getpid() != self.process:
            return ""
        full = os.path.abspath(os.fsdecode(path))
        return full if (full + os.sep).startswith(self.plan.folder + os.sep) else ""

    def _open(self, file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **named: Any) -> Any:
        """Open a file as `open` does; one in the folder that is written goes through `_File`."""
        path = self.files.get(file, "") if isinstance(file, int) else self._path(file)
        if not path or not WRITING & set(mode) or named.get("opener"):
            return self.real_open(file, mode, buffering, *rest, **named)
        raw_mode = mode.replace("b", "").replace("t", "")
        raw = self._reach("open", path, lambda: _File(self, path, file, raw_mode, named.get("closefd", True)))
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        text = {key: value for key, value in named.items() if key in ("encoding", "errors", "newline")}
        words = dict(zip(("encoding", "errors", "newline"), rest, strict=False))
        return io.TextIOWrapper(buffered, **{**words, **text}, line_buffering=buffering == 1)

    def _that_fits(self, content: Any, path: str) -> Any:
        """Return the part of the bytes for which the disk has room; raise the system's error if there is none."""
        if self.room < 0:
            return content
        content = memoryview(content).cast("B")
        if len(content) and not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        content = content[: self.room]
        self.room -= len(content)
        return content

    def _reach(self, name: str, path: str, call: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        """Perform a call, with the fault if it is the one of the plan."""
        plan, number = self.plan, self.calls
        self.calls += 1
        if plan.log:
            log = self.real["open"](plan.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            self.real["write"](log, f"{name} {path}\n".encode())
            os.closerange(log, log + 1)
        if number != plan.call and not (plan.keeps_failing and self.failing == name):
            return call()
        if plan.when == "within" and half is not None:
            half()
        result, failure = None, None
        if plan.when == "after":
            try:
                result = call()
            except OSError as error:
                failure = error
        if plan.shell:
            subprocess.run(["sh", "-c", plan.shell], capture_output=True)
        if plan.signal:
            self.real["kill"](os.getpid(), plan.signal)
            if plan.signal == signal.SIGKILL:
                signal.pause()
        if plan.error:
            self.failing = name
            raise OSError(plan.error, os.strerror(plan.error), path)
        if failure is not None:
            raise failure
        return result if plan.when == "after" else call()


class _File(io.FileIO):
    """A file whose writes count."""

    def __init__(self, injector: Injector, path: str, file: Any, mode: str, closefd: bool):
        super().__init__(file, mode, closefd=closefd)
        self.injector, self.path = injector, path
        injector.files[self.fileno()] = path

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")

        def write(part: Any = view) -> int:
            return io.FileIO.write(self, self.injector._that_fits(part, self.path))

        return self.injector._reach("write", self.path, write, lambda: write(view[: len(view) // 2]))

    def close(self) -> None:
        if not self.closed:
            self.injector.files.pop(self.fileno(), None)
        super().close()

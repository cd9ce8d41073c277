"""Nothing that is asked may hold the doctor up: checks side by side, each with a deadline; programs that are asked, too."""

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from procs.cli.doctor.finding import Finding, error
from procs.cli.doctor.subject import Subject

Check = Callable[[Subject], Iterable[Finding]]
"""A family of checks: raising is a finding, too."""
CHECK_SECONDS = 10.0
"""For a family: a file system or a driver that takes longer would hold up the start as well."""


def run(checks: Sequence[tuple[str, Check]], subject: Subject, seconds: float = CHECK_SECONDS) -> list[Finding]:
    """All of them at once; their findings in the order of ``checks``."""
    answers: dict[str, list[Finding]] = {}

    def look(name: str, check: Check) -> None:
        try:
            answers[name] = list(check(subject))
        except Exception as failure:
            said = " ".join(str(failure).split()) or type(failure).__name__
            answers[name] = [error(name, f"could not be looked at: {type(failure).__name__}: {said}", "look at it by hand")]

    threads = {name: threading.Thread(target=look, args=(name, check), daemon=True) for name, check in checks}
    for thread in threads.values():
        thread.start()
    end = time.monotonic() + seconds
    found: list[Finding] = []
    for name, thread in threads.items():
        thread.join(max(0.0, end - time.monotonic()))
        silent = [error(name, f"no answer within {seconds:g} s", "find what hangs: `dmesg`, a network file system, the driver")]
        found += answers.get(name, silent)
    return found


def ask(command: Sequence[str], seconds: float, environ: Mapping[str, str] | None = None) -> str:
    """What a program prints. Raises TimeoutError, OSError when it isn't there, ChildProcessError with its words when it fails.

    One that can't be killed (the driver's ioctl never returns) is not waited for.
    """
    asked = subprocess.Popen(
        command, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        out, said = asked.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as late:
        asked.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            asked.communicate(timeout=0.5)
        raise TimeoutError(f"{command[0]}: no answer within {seconds:g} s") from late
    if asked.returncode != 0:
        last = (said.strip().splitlines() or [f"exit code {asked.returncode}"])[-1]
        raise ChildProcessError(f"{command[0]}: {last}")
    return out

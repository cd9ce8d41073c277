"""A child that is asked on its standard input and answers in one marked line: for what can't be done in the tests' process."""

import json
import subprocess
import sys
from typing import Any

MARK = "ANSWER "


def ask(module: str, arguments: list[str], question: Any, environ: dict[str, str], seconds: float) -> Any:
    """What ``python -m module`` answers to the question. AssertionError with its last words when it doesn't."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *arguments],
        input=json.dumps(question),
        env=environ,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0][len(MARK) :])


def answer(found: Any) -> None:
    """In the child."""
    print(MARK + json.dumps(found), flush=True)

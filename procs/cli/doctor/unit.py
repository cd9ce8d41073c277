"""The systemd unit: whose installation it starts, and whether drop-ins took something away that a node needs."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from procs.cli import install_unit
from procs.cli.doctor.deadline import ask
from procs.cli.doctor.finding import Finding, error, ok, warning
from procs.cli.doctor.subject import Subject

BOOTED = Path("/run/systemd/system")
"""sd_booted(3)."""
STOP_SECONDS = 60
"""TimeoutStopSec: the node asks for 30 s more each second, so it needs to get a word in (docs/systemd.md)."""
NEEDED = {"KillMode": "mixed", "NotifyAccess": "main", "Delegate": "yes", "Type": "notify"}
WHY = {
    "KillMode": "a stop signals every process at once: no stream finishes",
    "NotifyAccess": "systemd doesn't hear the node",
    "Delegate": "the engine gets no cgroup of its own: what it leaves is killed one by one",
    "Type": "a start is over before the model is loaded",
}
UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1, "min": 60, "h": 3600, "d": 86400}


def check(subject: Subject) -> Iterator[Finding]:
    path = Path("/") / install_unit.UNIT
    if not path.exists():
        if BOOTED.is_dir():
            yield ok("systemd", "no unit is installed (`sgnode install-unit`)")
        return
    yield from whose(path.read_text(), install_unit.interpreter(sys.argv[0]))
    if BOOTED.is_dir():
        name = subject.config.name if subject.config else "default"
        show = ask(
            ["systemctl", "show", f"sgnode@{name}", f"--property={','.join((*NEEDED, 'TimeoutStopUSec', 'NeedDaemonReload'))}"],
            5.0,
        )
        yield from settings(dict(line.split("=", 1) for line in show.splitlines() if "=" in line))


def whose(text: str, python: Path) -> Iterator[Finding]:
    """The unit's text against this installation and this version."""
    lines = text.splitlines()
    start = next((line.partition("=")[2].split()[0] for line in lines if line.startswith("ExecStart=")), "")
    user = next((line.partition("=")[2] for line in lines if line.startswith("User=")), install_unit.USER)
    again = "`sgnode install-unit`, called by the path that it shall have"
    if not Path(start).exists():
        yield error("systemd", f"the unit starts {start or 'nothing'}, which isn't there", again)
    elif Path(start).parent.resolve() != python.parent.resolve():
        yield warning("systemd", f"the unit starts {start}, this is {python}", again)
    elif text != install_unit.text(install_unit.UNIT, Path(start), user):
        yield warning("systemd", "the unit is not the one of this version", "`sgnode install-unit`; changes belong into drop-ins")
    else:
        yield ok("systemd", f"the unit starts {start}")


def seconds(text: str) -> float:
    """systemd's ``1min 30s`` or ``infinity``. Raises ValueError."""
    if text == "infinity":
        return float("inf")
    total = 0.0
    for part in text.split():
        number = part.rstrip("abcdefghijklmnopqrstuvwxyz")
        total += float(number) * UNITS[part[len(number) :] or "s"]
    return total


def settings(shown: Mapping[str, str]) -> Iterator[Finding]:
    """`systemctl show`: the unit with its drop-ins."""
    for name, value in NEEDED.items():
        if name in shown and shown[name] != value:
            yield error(
                "systemd", f"{name}={shown[name]}: {WHY[name]}", f"{name}={value} (a drop-in changes it: `systemctl cat`)"
            )
    try:
        stop = seconds(shown.get("TimeoutStopUSec", "infinity"))
    except (ValueError, KeyError):
        stop = float("inf")
    if stop < STOP_SECONDS:
        yield error(
            "systemd",
            f"TimeoutStopSec={stop:g}: a drain is killed before it has said a word",
            f"TimeoutStopSec={STOP_SECONDS}, no less",
        )
    if shown.get("NeedDaemonReload") == "yes":
        yield warning("systemd", "the unit was changed and not read again", "`systemctl daemon-reload`")

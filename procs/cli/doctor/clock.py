"""Whether the clock is disciplined: the kernel says (adjtimex), without asking a daemon."""

import ctypes
from collections.abc import Iterator

from procs.cli.doctor.finding import Finding, ok, warning
from procs.cli.doctor.subject import Subject

WITHIN_US = 16_000_000
"""systemd's own threshold for NTPSynchronized (src/basic/time-util.c)."""


class _Timex(ctypes.Structure):
    """The beginning of adjtimex(2)'s struct; the rest is padding here."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_byte * 256),
    )


def max_error_us() -> int:
    """How wrong the clock may be, microseconds. Raises OSError."""
    now = _Timex()
    if ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(now)) < 0:
        raise OSError(ctypes.get_errno(), "adjtimex")
    return int(now.maxerror)


def check(subject: Subject) -> Iterator[Finding]:
    nnodes = subject.config.nnodes if subject.config else 1
    yield judge(max_error_us(), nnodes)


def judge(error_us: int, nnodes: int) -> Finding:
    if error_us < WITHIN_US:
        return ok("clock", f"synchronised, within {error_us / 1000:.0f} ms")
    why = (
        "nodes of a group whose clocks are more than 2 s apart don't start"
        if nnodes > 1
        else "logs and traces of several machines won't fit"
    )
    return warning(
        "clock",
        f"not synchronised: {why}",
        "`timedatectl set-ntp true`, or chrony; in a virtual machine or container: on its host",
    )

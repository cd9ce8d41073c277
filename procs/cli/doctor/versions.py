"""Versions that this one was tested with, and an installation that is in one piece."""

import os
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import procs
from procs.cli.doctor.finding import Finding, error, ok, warning
from procs.cli.doctor.subject import Subject

DYNAMO = "1.6.1"
SGLANG_CPU, SGLANG_GPU = "0.5.23", "0.5.16"
PACKAGES = ("sglang", "ai-dynamo", "ai-dynamo-runtime")


def installed(name: str) -> tuple[str, Path] | None:
    """Version, and the directory that it is in."""
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return None
    return found.version, Path(str(found.locate_file("")))


def check(subject: Subject) -> Iterator[Finding]:
    here = {name: found for name in PACKAGES if (found := installed(name)) is not None}
    yield from judge(
        {name: version for name, (version, _) in here.items()}, on_cpu=subject.on_cpu, needs_sglang=not subject.synthetic
    )
    prefix = Path(sys.prefix).resolve()
    elsewhere = {name: place for name, (_, place) in here.items() if not place.resolve().is_relative_to(prefix)}
    if elsewhere:
        name, place = next(iter(elsewhere.items()))
        hint = "unset PYTHONPATH" if os.environ.get("PYTHONPATH") else "install it here: `make setup`"
        yield warning("installation", f"{name} comes from {place}, not from {sys.prefix}", hint)
    elif sys.prefix == sys.base_prefix:
        yield warning(
            "installation", f"{sys.prefix} is no virtual environment", "one of its own: another program's upgrade is this one's"
        )
    else:
        yield ok("installation", f"{sys.prefix}, {Path(procs.__path__[0]).parent}")
    if subject.running and subject.config is not None:
        yield from runs_another(subject)


def judge(found: Mapping[str, str], *, on_cpu: bool, needs_sglang: bool = True) -> Iterator[Finding]:
    """``found``: versions by package."""
    tested = SGLANG_CPU if on_cpu else SGLANG_GPU
    for name, expected in (("sglang", tested), ("ai-dynamo", DYNAMO), ("ai-dynamo-runtime", DYNAMO)):
        version = found.get(name)
        if version is None:
            if name != "sglang" or needs_sglang:
                yield error("versions", f"{name} is not installed", "`make setup`")
        elif version != expected:
            where = "a CPU host" if on_cpu else "a GPU host"
            yield warning(
                "versions",
                f"{name} {version}: tested on {where} with {expected}",
                f"{name}=={expected}, or try it before it serves",
            )
    if all(found.get(name) == expected for name, expected in (("sglang", tested), ("ai-dynamo", DYNAMO))):
        yield ok("versions", f"SGLang {tested}, Dynamo {DYNAMO}, Python {sys.version.split()[0]}")


def runs_another(subject: Subject) -> Iterator[Finding]:
    """A node that was started by another installation, or version, than the one that asks."""
    from importlib.metadata import version

    assert subject.config is not None
    own = version("sgnode")
    try:
        running = Path(f"/proc/{subject.supervisord}/cmdline").read_bytes().split(b"\0")[0].decode()
    except OSError:
        return
    if subject.config.version != own:
        words = f"the node was started by sgnode {subject.config.version}, this is {own}"
        yield warning(
            "versions", words, "restart its processes one by one (docs/operations.md, Upgrade), or ask with its own sgnode"
        )
    elif Path(running).parent.resolve() != Path(sys.prefix).resolve() / "bin":
        yield warning(
            "installation",
            f"the node runs from {Path(running).parent}, this is {sys.prefix}/bin",
            "restart it, or ask with its own sgnode",
        )

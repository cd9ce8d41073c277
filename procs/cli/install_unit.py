"""`sgnode install-unit`: the systemd unit with this installation's own paths, its user, its directories, an example."""

import os
import pwd
import sys
from importlib.resources import files
from pathlib import Path

from procs.cli.flags import Parser
from shared.errors import NodeError

PYTHON = "/opt/sgnode/bin/python"
"""The interpreter in the unit as it is in the repository."""
USER = "sgnode"
HOME = "/var/lib/sgnode"
UNIT = Path("etc/systemd/system/sgnode@.service")
SYSUSERS = Path("etc/sysusers.d/sgnode.conf")
TMPFILES = Path("etc/tmpfiles.d/sgnode.conf")
CONFIGS = Path("etc/sgnode")
EXAMPLE = CONFIGS / "default.yaml"
SOURCES = {UNIT: "sgnode@.service", SYSUSERS: "sysusers.conf", TMPFILES: "tmpfiles.conf", EXAMPLE: "example.yaml"}
"""Where each goes -> what it is called in this package (procs/units)."""


def main(argv: list[str]) -> int:
    """Write the files, or print them. Raises NodeError, having written nothing, when they would not work."""
    made = Parser(
        prog="sgnode install-unit",
        description="Write sgnode@.service with this installation's paths, its sysusers and tmpfiles snippets and an example "
        "configuration, where there is none. Needs root.",
        allow_abbrev=False,
    )
    made.add_argument("--print", action="store_true", help="show the unit, write nothing")
    made.add_argument("--root", type=Path, default=Path("/"), metavar="DIR", help="write below DIR (an image, a package)")
    made.add_argument("--user", default=USER, metavar="NAME", help="who runs the nodes (default: %(default)s)")
    found = made.parse_args(argv)
    python = interpreter(sys.argv[0])
    texts = {path: text(path, python, found.user) for path in SOURCES}
    if found.user != USER:
        del texts[SYSUSERS]  # the user is somebody else's to make
    if any((found.root / CONFIGS).glob("*.yaml")):
        del texts[EXAMPLE]
    if found.print:
        print(texts[UNIT], end="")
        return 0
    if found.root == Path("/"):
        if os.geteuid() != 0:
            raise NodeError(f"install-unit writes /{UNIT}: run it as root (or see it with --print)")
        closed = closed_to(python, found.user)
        if closed is not None:
            raise NodeError(
                f"user {found.user!r} can't run {python}: {closed} is closed to it; "
                "install sgnode where it can (/opt/sgnode), or pass --user"
            )
    for path, content in texts.items():
        _write(found.root / path, content)
        print(f"wrote {found.root / path}")
    if found.root == Path("/"):
        make_user = "" if SYSUSERS not in texts else f"systemd-sysusers {SYSUSERS.name} && "
        print(
            "next:\n"
            f"  {make_user}systemd-tmpfiles --create {TMPFILES.name} && systemctl daemon-reload\n"
            f"  editor /{EXAMPLE}\n"
            "  systemctl enable --now sgnode@default"
        )
    return 0


def interpreter(command: str) -> Path:
    """This installation's python by the path that it was called by: a symlink in it may be what an upgrade switches.

    The script's own first line, and so sys.executable, names the virtual environment that it was installed into.
    """
    beside = Path(os.path.abspath(command)).with_name("python")
    if Path(command).name == "sgnode" and beside.exists() and beside.resolve() == Path(sys.executable).resolve():
        return beside
    return Path(sys.executable)


def text(path: Path, python: Path, user: str) -> str:
    """One of the files for this installation. Raises NodeError for a name or a path that a unit can't have."""
    if not user or not all(c.isalnum() or c in "-_." for c in user):
        raise NodeError(f"--user: expected a user's name, got {user!r}")
    if any(c.isspace() or c in "%$\"'\\;" for c in str(python)):
        raise NodeError(f"{python}: a unit can't name a path with spaces or one of %$\"'\\; in it")
    content = files("procs").joinpath("units", SOURCES[path]).read_text()
    content = content.replace(PYTHON, str(python))
    if user != USER:
        content = content.replace(f"User={USER}\n", f"User={user}\n")
    return content


def closed_to(python: Path, user: str) -> Path | None:
    """The directory or file on the way to the interpreter, links followed, that the user can't pass; None when there is none."""
    if user == "root":
        return None
    try:
        entry = pwd.getpwnam(user)
        uid, groups = entry.pw_uid, set(os.getgrouplist(user, entry.pw_gid))
    except KeyError:  # made later: it is nobody's yet
        uid, groups = -1, set()
    target = python.resolve()
    for path in (*reversed(python.parents), *reversed(target.parents), target):
        found = path.stat()
        bits = found.st_mode >> 6 if found.st_uid == uid else found.st_mode >> 3 if found.st_gid in groups else found.st_mode
        if not bits & 1:
            return path
    return None


def _write(path: Path, content: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(content)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise NodeError(f"{path}: {error.strerror}") from error

"""A machine with a booted systemd: Debian's systemd-container over an overlay of this host's files, its own network, no image."""

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from procs.cli.status import GONE, document_of
from tests.harness import wait_for

T = TypeVar("T")
VENV = "/opt/sgnode"
CHECKOUT = "/srv/checkout"
"""Where the installation and the code under test are on the machine."""
CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class Machine:
    """Booted by ``with Machine({}) as machine``. Needs root. What it writes goes with it: its files are in a tmpfs.

    ``binds``: folders of this host -> where they are on the machine, read-only (/tmp is another one there).
    """

    def __init__(self, binds: Mapping[Path, str]) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="sgnode-machine-", dir="/var/tmp"))
        self.root = self.place / "root"
        self._binds = binds
        self._mounts: list[Path] = []
        self._nspawn: subprocess.Popen[bytes] | None = None
        self.pid = 0

    def __enter__(self) -> "Machine":
        try:
            self._lay_over()
            self._boot()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._nspawn is not None:
            # With its pid 1 goes everything on it, and then nspawn.
            os.kill(self.pid or self._nspawn.pid, signal.SIGKILL)
            self._nspawn.wait(20)
        for mount in reversed(self._mounts):
            wait_for(f"{mount} is free", lambda mount=mount: _run("umount", str(mount)) == 0, 20, every=0.1)
        shutil.rmtree(self.place, ignore_errors=True)

    def _mount(self, at: Path, *arguments: str) -> None:
        at.mkdir(exist_ok=True)
        subprocess.run(["mount", *arguments, str(at)], check=True, capture_output=True)
        self._mounts.append(at)

    def _lay_over(self) -> None:
        upper = self.place / "upper"
        self._mount(upper, "-t", "tmpfs", "tmpfs")
        for name in ("files", "work"):
            (upper / name).mkdir()
        self._mount(self.root, "-t", "overlay", "overlay", "-o", f"lowerdir=/,upperdir={upper}/files,workdir={upper}/work")
        (self.root / "etc/machine-id").write_text(os.urandom(16).hex() + "\n")
        (self.root / "root").chmod(0o755)  # an interpreter of pyenv's may be in there, and a service's user must reach it
        (self.root / "etc/systemd/journald.conf.d").mkdir(parents=True, exist_ok=True)
        (self.root / "etc/systemd/journald.conf.d/test.conf").write_text("[Journal]\nStorage=volatile\nRateLimitBurst=0\n")

    def _boot(self) -> None:
        command = ["systemd-nspawn", "-q", "-D", str(self.root), "--register=no", "--keep-unit", "-b", "--console=pipe"]
        command += ["--private-network", "--link-journal=no", *(f"--bind-ro={path}:{at}" for path, at in self._binds.items())]
        environment = {**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}
        with (self.place / "console").open("wb") as console:
            self._nspawn = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT
            )
        self.pid = wait_for("init", self._init, 20)
        wait_for("booted", lambda: self.run("systemctl", "is-system-running").strip() in ("running", "degraded"), 60, every=0.2)

    def _init(self) -> int:
        """The machine's pid 1 as this host numbers it: the child of nspawn that is pid 1 in a namespace."""
        assert self._nspawn is not None
        if self._nspawn.poll() is not None:
            raise AssertionError(f"systemd-nspawn: {(self.place / 'console').read_text()}")
        children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text().split()
        for child in children:
            found = re.search(r"^NSpid:\s+\d+\s+1$", Path(f"/proc/{child}/status").read_text(), re.MULTILINE)
            if found and Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                return int(child)
        return 0

    # --- what one does on it ---

    def run(self, *command: str, check: bool = False, timeout: float = 60.0) -> str:
        """Run a command as root on it; what it printed, standard error after standard output."""
        entered = ["nsenter", "-t", str(self.pid), "-m", "-u", "-i", "-n", "-p", "-C", "--", *command]
        done = subprocess.run(entered, capture_output=True, text=True, timeout=timeout, check=False)
        assert not check or done.returncode == 0, (command, done.returncode, done.stdout, done.stderr)
        return done.stdout + done.stderr

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Begin a command as root on it."""
        entered = ["nsenter", "-t", str(self.pid), "-m", "-u", "-i", "-n", "-p", "-C", "--", *command]
        return subprocess.Popen(entered, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def write(self, path: str, text: str) -> None:
        """Write a file of the machine's."""
        target = Path(f"/proc/{self.pid}/root{path}")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def read(self, path: str) -> str:
        return Path(f"/proc/{self.pid}/root{path}").read_text(errors="replace")

    def on_network(self, call: Callable[[], T]) -> T:
        """Call something whose sockets are the machine's; from a thread of its own, which enters the network and ends."""
        result: list[T] = []
        failure: list[BaseException] = []

        def run() -> None:
            try:
                with Path(f"/proc/{self.pid}/ns/net").open() as namespace:
                    if _libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
                        raise OSError(ctypes.get_errno(), "setns")
                result.append(call())
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if failure:
            raise failure[0]
        return result[0]


def _run(*command: str) -> int:
    return subprocess.run(command, capture_output=True, check=False).returncode


class Service:
    """One instance of sgnode@.service on a machine."""

    def __init__(self, machine: Machine, name: str) -> None:
        self.machine = machine
        self.name = name
        self.unit = f"sgnode@{name}.service"

    def ctl(self, *arguments: str, timeout: float = 60.0) -> str:
        return self.machine.run("systemctl", *arguments, self.unit, timeout=timeout)

    def show(self, key: str) -> str:
        return self.machine.run("systemctl", "show", "--value", "-p", key, self.unit).strip()

    def drop_in(self, text: str) -> None:
        """Settings of this instance alone."""
        self.machine.write(f"/etc/systemd/system/{self.unit}.d/this.conf", text)
        self.machine.run("systemctl", "daemon-reload", check=True)

    def configure(self, text: str) -> None:
        self.machine.write(f"/etc/sgnode/{self.name}.yaml", text)

    def wait(self, key: str, value: str, seconds: float = 30.0) -> None:
        wait_for(f"{key}={value} (now {self.show(key)})", lambda: self.show(key) == value, seconds, every=0.1)

    def status(self) -> dict[str, Any]:
        """The node's status document by its own command, {} while there is none."""
        python = ("env", f"PYTHONPATH={CHECKOUT}", f"{VENV}/bin/python", "-P", "-m", "procs.cli")
        try:
            document: dict[str, Any] = json.loads(
                self.machine.run(*python, "status", "--json", "--runtime-dir", f"/run/sgnode/{self.name}")
            )
        except json.JSONDecodeError:
            return {}
        return document

    def document(self) -> dict[str, Any]:
        """The same, asked without a process for each look."""
        try:
            return document_of(Path(f"/proc/{self.machine.pid}/root/run/sgnode/{self.name}"))
        except GONE:
            return {}

    def row(self, process: str) -> dict[str, Any]:
        return next((row for row in self.status().get("processes", []) if row["name"] == process), {})

    def instances(self) -> list[Path]:
        """The workers in the node's file discovery."""
        root = Path(f"/proc/{self.machine.pid}/root/run/sgnode/{self.name}/discovery/v1/instances")
        return [path for path in root.rglob("*") if path.is_file() and "generate" in str(path)] if root.is_dir() else []

    def pids(self) -> dict[int, str]:
        """Everything in the unit's cgroup: pid on this host -> command line."""
        mark = f"/{self.unit}"
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if mark in (entry / "cgroup").read_text() and (entry / "cmdline").read_bytes():
                        found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                except OSError:
                    continue
        return found

    def main_pid(self) -> int:
        """supervisord's pid on this host."""
        inner = self.show("MainPID")
        for pid in self.pids():
            numbers = re.search(r"^NSpid:\s+(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
            if numbers and numbers[1].split()[-1] == inner:
                return pid
        raise AssertionError(f"no process {inner} in {self.unit}")

    def kill(self, number: signal.Signals) -> int:
        pid = self.main_pid()
        os.kill(pid, number)
        return pid

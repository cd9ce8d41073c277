"""One booted machine for the whole directory, with sgnode installed on it by `sgnode install-unit`."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.streams import Streams
from tests.systemd.machine import CHECKOUT, VENV, Machine, Service

REPOSITORY = Path(__file__).parents[2]
MODEL = "/srv/model"
TESTING = f"[Service]\nEnvironment=PYTHONPATH={CHECKOUT} HF_HUB_OFFLINE=1\n"
"""Of every instance here: the code under test is a checkout."""


@pytest.fixture(scope="session")
def machine(model: Path) -> Iterator[Machine]:
    if os.geteuid() != 0 or shutil.which("systemd-nspawn") is None:
        pytest.skip("needs root and Debian's systemd-container")
    with Machine({REPOSITORY: CHECKOUT, Path(sys.prefix): "/srv/venv-1"}) as booted:
        # The demo model and a virtual environment behind a link, where an operator has them.
        shutil.copytree(model, f"/proc/{booted.pid}/root{MODEL}")
        booted.run("chmod", "-R", "a+rX", MODEL, check=True)
        booted.run("ln", "-s", "/srv/venv-1", VENV, check=True)
        installed = booted.run(
            "env", f"PYTHONPATH={CHECKOUT}", f"{VENV}/bin/python", "-P", "-m", "procs.cli", "install-unit", check=True
        )
        booted.write("/root/installed", installed)
        booted.write("/etc/systemd/system/sgnode@.service.d/test.conf", TESTING)
        booted.run("systemd-sysusers", "sgnode.conf", check=True)
        booted.run("systemd-tmpfiles", "--create", "sgnode.conf", check=True)
        booted.run("systemctl", "daemon-reload", check=True)
        yield booted


def yaml(port: int, **settings: object) -> str:
    """A node with the synthetic engine; its ports follow from ``port``."""
    known = {"step_seconds": 0.01, "load_seconds": 0.2} | settings.pop("synthetic", {})  # type: ignore[operator]
    lines = [f"model: {MODEL}", "served-model-name: synthetic", f"http-port: {port}", f"system-port: {port + 1}"]
    lines += [f"{key}: {value}" for key, value in settings.items()]
    dials = ", ".join(f"{key}: {value}" for key, value in known.items())
    return "\n".join(lines) + f"\nsynthetic: {{{dials}}}\n"


@pytest.fixture
def service(machine: Machine, request: pytest.FixtureRequest) -> Iterator[Service]:
    """An instance of its own; stopped and forgotten afterwards."""
    made = Service(machine, request.node.name.removeprefix("test_")[:24].rstrip("_").replace("_", "-"))
    made.configure(yaml(8100))
    yield made
    made.machine.run("systemctl", "kill", "-s", "KILL", made.unit)
    made.ctl("stop")
    made.ctl("reset-failed")


@pytest.fixture
def streams(machine: Machine) -> Iterator[Streams]:
    """Clients on the machine's network."""
    made = machine.on_network(Streams)
    yield made
    made.close()

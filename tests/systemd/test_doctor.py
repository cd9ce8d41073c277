"""`sgnode doctor` beside systemd: a service that runs well, and drop-ins that take away what a node needs."""

import json

from tests.systemd.machine import CHECKOUT, VENV, Machine, Service


def doctor(machine: Machine, *arguments: str) -> list[dict[str, str]]:
    command = ["env", f"PYTHONPATH={CHECKOUT}", f"{VENV}/bin/python", "-P", "-m", "procs.cli", "doctor", *arguments, "--json"]
    found: list[dict[str, str]] = json.loads(machine.run(*command))
    return found


def test_a_service(machine: Machine, service: Service) -> None:
    machine.run("systemctl", "start", service.unit, check=True)
    found = doctor(machine, "--name", service.name)
    assert [each for each in found if each["level"] == "error"] == []
    said = {f"{each['check']}: {each['found']}" for each in found}
    assert f"systemd: the unit starts {VENV}/bin/python" in said
    assert any(each.startswith("engine: has a cgroup of its own") for each in said)
    service.drop_in("[Service]\nDelegate=no\nTimeoutStopSec=5\nKillMode=control-group\n")
    found = doctor(machine, "--name", service.name)
    wrong = " ".join(each["found"] for each in found if each["level"] == "error" and each["check"] == "systemd")
    assert "Delegate=no" in wrong and "TimeoutStopSec=5" in wrong and "KillMode=control-group" in wrong

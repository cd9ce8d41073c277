"""`sgnode install-unit`: the unit with this installation's paths and user, what is kept, what is refused."""

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from procs.cli import install_unit
from procs.cli.main import run
from shared.errors import NodeError
from tests.harness import SGNODE

UNIT = "etc/systemd/system/sgnode@.service"
CONFIG = "etc/sgnode/default.yaml"


def install(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [SGNODE, "install-unit", "--root", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_all_four_files_with_this_installations_interpreter(tmp_path: Path) -> None:
    done = install(tmp_path)
    assert done.returncode == 0, done.stderr
    written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert written == [CONFIG, UNIT, "etc/sysusers.d/sgnode.conf", "etc/tmpfiles.d/sgnode.conf"]
    assert all((tmp_path / name).stat().st_mode & 0o777 == 0o644 for name in written)
    assert [line.removeprefix(f"wrote {tmp_path}/") for line in done.stdout.splitlines()] == [written[i] for i in (1, 2, 3, 0)]
    unit = (tmp_path / UNIT).read_text()
    python = Path(SGNODE).with_name("python")
    assert f"ExecStart={python} -P -m procs.cli serve " in unit and f"ExecReload={python} -P -m procs.cli ctl " in unit
    assert install_unit.PYTHON not in unit and "User=sgnode\n" in unit
    assert install(tmp_path, "--print").stdout == unit


def test_the_link_that_it_was_called_through_stays_in_the_unit(tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(Path(SGNODE).parents[1])
    command = [str(link / "bin/sgnode"), "install-unit", "--print"]
    unit = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    assert f"ExecStart={link}/bin/python " in unit


def test_another_user_is_somebody_elses_to_make(tmp_path: Path) -> None:
    assert install(tmp_path, "--user", "gpu.svc").returncode == 0
    assert "\nUser=gpu.svc\n" in (tmp_path / UNIT).read_text()
    assert not (tmp_path / "etc/sysusers.d").exists()


def test_written_anew_but_no_configuration_is_touched(tmp_path: Path) -> None:
    assert install(tmp_path).returncode == 0
    (tmp_path / CONFIG).write_text("mine")
    (tmp_path / UNIT).write_text("old")
    assert install(tmp_path).returncode == 0
    assert (tmp_path / CONFIG).read_text() == "mine" and "ExecStart=" in (tmp_path / UNIT).read_text()
    (tmp_path / CONFIG).rename(tmp_path / "etc/sgnode/other.yaml")
    assert install(tmp_path).returncode == 0 and not (tmp_path / CONFIG).exists()


@pytest.mark.parametrize("user", ["", "a b", "x\nExecStart=/bin/sh", "%u"])
def test_a_name_that_is_none_is_one_line_and_writes_nothing(tmp_path: Path, user: str) -> None:
    done = install(tmp_path, "--user", user)
    assert done.returncode == 2 and done.stderr.startswith("sgnode: error: --user: expected a user's name")
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("python", ["/opt/my sgnode/bin/python", "/opt/%i/bin/python", "/opt/a;b/python"])
def test_a_path_that_a_unit_cannot_name_is_refused(python: str) -> None:
    with pytest.raises(NodeError, match="a unit can't name a path"):
        install_unit.text(install_unit.UNIT, Path(python), "sgnode")


def test_without_root_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert run(["install-unit"]) == 2
    error = capsys.readouterr().err
    assert error == f"sgnode: error: install-unit writes /{UNIT}: run it as root (or see it with --print)\n"


def test_an_installation_that_its_user_cannot_reach_is_refused(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    (closed / "bin").mkdir(parents=True)
    for path in (tmp_path, *tmp_path.parents[:-2]):  # pytest's own directories are for their owner alone
        if path.stat().st_uid == os.getuid():
            path.chmod(path.stat().st_mode | 0o111)
    python = closed / "bin/python"
    python.write_text("")
    python.chmod(0o755)
    assert install_unit.closed_to(python, "sgnode") is None
    closed.chmod(0o700)
    assert install_unit.closed_to(python, "sgnode") == closed
    assert install_unit.closed_to(python, "root") is None
    if os.getuid() != 0:
        assert install_unit.closed_to(python, pwd.getpwuid(os.getuid()).pw_name) is None


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "etc").write_text("a file")
    done = install(tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert str(tmp_path / "etc") in done.stderr


def test_it_is_in_the_help() -> None:
    done = subprocess.run([sys.executable, "-m", "procs.cli", "--help"], capture_output=True, text=True, timeout=30, check=True)
    assert "install-unit" in done.stdout
    more = subprocess.run([SGNODE, "install-unit", "--help"], capture_output=True, text=True, timeout=30, check=True).stdout
    assert all(flag in more for flag in ("--root", "--user", "--print"))

"""An upgrade and the way back: versioned virtual environments behind a link, side processes one by one, the engine in its own."""

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

from tests.harness import Node, instances, running, wait_for
from tests.node.conftest import MODEL
from tests.streams import FOREVER, Streams

SIDE = ("relay", "prober", "coordinator")


def virtual_environment(path: Path) -> None:
    """A virtual environment with everything that this one has."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(path)], check=True)
    (packages,) = path.glob("lib/python*/site-packages")
    (packages / "all.pth").write_text(f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})\n")


def version_of(pid: int, root: Path) -> str:
    """Name of the virtual environment that a process runs from."""
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0].removeprefix(f"{root}/").split("/")[0]


def test_side_processes_move_to_a_new_version_and_back_under_a_running_engine(
    make_node: Callable[..., Node], streams: Streams, tmp_path: Path
) -> None:
    link = tmp_path / "current"
    for name in ("v1", "v2"):
        virtual_environment(tmp_path / name)

    def switch(name: str) -> None:
        (tmp_path / "new").symlink_to(name)
        os.replace(tmp_path / "new", link)

    switch("v1")
    node = make_node("--agents", "2", "--drain-grace", "0.5")
    node.program = [str(link / "bin/python"), "-P", "-m", "procs.cli"]
    node.start().wait_ready(60)
    wait_for("both agents", lambda: len(instances(node)) == 2, 20)
    names = ["engine", "keeper", *SIDE, "agent:0", "agent:1"]
    engine = node.pid("engine")
    assert {version_of(node.pid(name), tmp_path) for name in names} == {"v1"}
    for version in ("v2", "v1"):
        switch(version)
        results = streams.start(node.url, MODEL, 16, 400)
        streams.flowing(results)
        for name in (*SIDE, "agent"):
            done = node.sgnode("restart", name)
            assert done.returncode == 0, done.stderr
        streams.join()
        assert all(r.complete and r.tokens == 400 for r in results), [r for r in results if not r.complete][:2]
        node.wait_ready(20)
        now = {name: version_of(node.pid(name), tmp_path) for name in names}
        assert now == dict.fromkeys(names, version) | {"engine": "v1", "keeper": "v1"}
        assert node.pid("engine") == engine
    # The engine takes the version that the link shows at its own restart, behind a drain.
    switch("v2")
    forever = streams.start(node.url, MODEL, 1, FOREVER)
    running(node, 1)
    node.sgnode("drain", "--now")
    assert node.sgnode("restart", "engine").returncode == 0
    assert node.sgnode("resume").returncode == 0
    node.wait_ready(30)
    assert version_of(node.pid("engine"), tmp_path) == version_of(node.pid("keeper"), tmp_path) == "v2"
    wait_for("the stream's end", lambda: forever[0].ended, 10)

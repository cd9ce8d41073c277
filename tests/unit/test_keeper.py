"""The keeper with real process trees: deaths said at once, stops, and nothing left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from procs.keeper import leftovers, life, tree
from shared import config
from shared.frames import Beat, Death, KeeperState
from shared.sockets import subscriber

ENGINE = textwrap.dedent("""
    import os, signal, subprocess, sys, time
    role = sys.argv[1]
    if role == "child":
        import setproctitle
        setproctitle.setproctitle(f"sgnode::child_{sys.argv[2]}")
        if sys.argv[2] == "stray":
            os.setsid()
        open(f"{os.environ['SGNODE_RUNTIME_DIR']}/pid-{sys.argv[2]}", "w").write(str(os.getpid()))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.pause()
    if role == "helper":
        sys.exit(3)
    if "deaf" in role:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    names = ["a", "b", "stray"]
    for name in names:
        subprocess.Popen([sys.executable, __file__, "child", name])
    helper = subprocess.Popen([sys.executable, __file__, "helper"])
    if "polite" in role:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    helper.wait()
    open(f"{os.environ['SGNODE_RUNTIME_DIR']}/pid-engine", "w").write(str(os.getpid()))
    open(f"{os.environ['TMPDIR']}/rubbish", "w").write("x")
    while True:
        time.sleep(0.2)
""")

KEEPER = textwrap.dedent("""
    import sys
    from procs.keeper.keeper import keep
    from shared import config, logs
    logs.setup("keeper")
    sys.exit(keep(config.load(), [sys.executable, *sys.argv[1:]], 8.0))
""")


def eventually(what: Callable[[], Any], seconds: float = 8.0) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        value = what()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.005)


class Node:
    """A runtime directory with one keeper in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "sock").mkdir()
        config.save(
            config.NodeConfig(
                name="t", runtime_dir=str(directory), version="0", role="aggregated", model_path="m", served_model_name="m"
            )
        )
        self.engine_file = directory / "engine.py"
        self.engine_file.write_text(ENGINE)
        self.context: zmq.Context[Any] = zmq.Context()
        self.sub = subscriber(self.context, directory, ["keeper"])
        self.keeper: subprocess.Popen[bytes] | None = None

    def start(self, kind: str) -> subprocess.Popen[bytes]:
        environ = {**os.environ, "SGNODE_RUNTIME_DIR": str(self.directory)}
        self.keeper = subprocess.Popen([sys.executable, "-c", KEEPER, str(self.engine_file), kind], env=environ)
        return self.keeper

    def pid(self, name: str) -> int:
        file = self.directory / f"pid-{name}"
        return int(eventually(lambda: file.exists() and file.read_text()))

    def up(self) -> None:
        """Wait until the engine is up and the keeper watches all of it."""
        pids = [self.pid(name) for name in ("a", "b", "stray", "engine")]
        assert self.keeper is not None
        keeper = self.keeper.pid
        eventually(lambda: _pidfds(keeper) >= set(pids))

    def frame(self, kind: type, seconds: float = 5.0) -> Any:
        deadline = time.monotonic() + seconds
        decoder = msgspec.msgpack.Decoder(KeeperState)
        while self.sub.poll(max(0, int((deadline - time.monotonic()) * 1000))):
            frame = decoder.decode(self.sub.recv())
            if isinstance(frame, kind):
                return frame
        raise AssertionError(f"no {kind.__name__} within {seconds} s")

    def left(self) -> list[int]:
        return leftovers.find(self.directory)


def _pidfds(pid: int) -> set[int]:
    found = set()
    for fd in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(OSError):
            found |= {int(line.split()[1]) for line in fd.read_text().splitlines() if line.startswith("Pid:")}
    return found


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    if made.keeper is not None and made.keeper.poll() is None:
        made.keeper.terminate()  # it also removes its cgroup
        made.keeper.wait(10)
    for pid in made.left():
        tree.kill(pid)
    made.sub.close()
    made.context.term()


@pytest.mark.parametrize(("victim", "who"), [("b", "child"), ("stray", "child"), ("engine", "engine")])
def test_first_death_is_said_at_once_and_everything_is_freed(node: Node, victim: str, who: str) -> None:
    keeper = node.start("plain")
    node.up()
    node.frame(Beat)
    pid = node.pid(victim)
    before = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    death = node.frame(Death)
    assert time.monotonic() - before < 0.2
    assert (death.incarnation, death.who, death.pid) == (1, who, pid)
    assert "SIGKILL" in death.reason
    assert keeper.wait(5) == 1
    assert time.monotonic() - before < 1.5
    assert node.left() == []
    assert not (node.directory / "tmp" / "1").exists()


def test_stop_reaches_the_engine_alone_and_is_no_death(node: Node) -> None:
    keeper = node.start("polite")
    node.up()
    keeper.send_signal(signal.SIGTERM)
    assert keeper.wait(5) == 0
    frames = []
    while node.sub.poll(200):
        frames.append(msgspec.msgpack.decode(node.sub.recv(), type=KeeperState))
    assert not [frame for frame in frames if isinstance(frame, Death)]
    assert frames[-1].state == "stopped"
    assert node.left() == []


def test_an_engine_that_ignores_sigterm_while_loading_is_killed(node: Node) -> None:
    keeper = node.start("deaf")
    node.up()
    before = time.monotonic()
    keeper.send_signal(signal.SIGTERM)
    assert keeper.wait(6) == 0
    assert 2.5 < time.monotonic() - before < 4.5
    assert node.left() == []


def test_an_engine_that_does_not_exist_is_a_death(node: Node) -> None:
    environ = {**os.environ, "SGNODE_RUNTIME_DIR": str(node.directory)}
    code = KEEPER.replace("[sys.executable, *sys.argv[1:]]", "['/no/such/engine']")
    assert subprocess.run([sys.executable, "-c", code], env=environ, check=False, timeout=10).returncode == 127


def test_the_next_keeper_removes_what_a_killed_one_left(node: Node) -> None:
    keeper = node.start("plain")
    node.up()
    old = node.pid("a")
    keeper.kill()
    keeper.wait()
    eventually(lambda: node.pid("engine") not in node.left())  # by PDEATHSIG
    assert old in node.left()
    for name in ("a", "b", "stray", "engine"):
        (node.directory / f"pid-{name}").unlink()
    node.start("plain")
    node.up()
    assert old not in node.left()
    assert node.frame(Beat).incarnation == 2
    assert sorted(path.name for path in (node.directory / "tmp").iterdir()) == ["2"]


def test_without_a_cgroup_nothing_is_left_either(node: Node) -> None:
    code = "from procs.keeper.cgroup import Cgroup\nCgroup.make = lambda directory: None\n" + KEEPER
    environ = {**os.environ, "SGNODE_RUNTIME_DIR": str(node.directory)}
    node.keeper = subprocess.Popen([sys.executable, "-c", code, str(node.engine_file), "plain"], env=environ)
    node.up()
    os.kill(node.pid("a"), signal.SIGKILL)
    assert node.keeper.wait(5) == 1
    assert node.left() == []


def test_incarnations_grow_and_survive_rubbish(tmp_path: Path) -> None:
    assert life.begin(tmp_path).incarnation == 1
    second = life.begin(tmp_path)
    assert second.incarnation == 2
    assert second.metrics.is_dir()
    assert not (tmp_path / "tmp" / "1").exists()
    (tmp_path / "incarnation").write_text("?")
    assert life.begin(tmp_path).incarnation == 1


def test_what_a_life_left_in_shared_memory_goes_with_it_and_nothing_elses(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    first, other = life.begin(tmp_path / "a"), life.begin(tmp_path / "b")
    assert first.environment(tmp_path)["SGNODE_SHM_MARK"] == first.shm_mark != other.shm_mark
    names = [f"/dev/shm/sem.{mark}-x1" for mark in (first.shm_mark, other.shm_mark)]
    names += [f"/dev/shm/sglang_loads_{first.shm_mark}-ab_cd.shm", f"/tmp/sglang_load_collector_{first.shm_mark}-ab.sock"]
    files = [Path(name) for name in names]
    try:
        for file in files:
            file.touch()
        first.end()
        assert [file.exists() for file in files] == [False, True, False, False]
        life.begin(tmp_path / "b")  # its keeper was killed
        assert not files[1].exists()
    finally:
        for file in files:
            file.unlink(missing_ok=True)
    odd = life.begin(tmp_path / "a")
    (odd.tmp / life.SHM_MARK_FILE).write_text("")  # a disk that was full: no mark must not mean everything
    kept = Path(f"/dev/shm/sem.{odd.shm_mark}")
    kept.touch()
    odd.end()
    assert kept.exists()
    kept.unlink()


def test_essential_titles() -> None:
    assert tree.essential("sglang::scheduler_DP1_TP0") == "scheduler"
    assert tree.essential("sglang::detoken") == "detokenizer"
    assert tree.essential("sglang::data_parallel_controller") == "data parallel controller"
    assert tree.essential("python -c from multiprocessing.spawn") is None


def test_wait_status_in_words() -> None:
    assert tree.how(signal.SIGKILL) == "killed by SIGKILL"
    assert tree.how(3 << 8) == "exited with code 3"


def test_a_process_that_still_gives_back_its_memory_counts_as_dead() -> None:
    fields = ["S", "1", "1", "1", "0", "-1", str(0x400000)] + ["0"] * 41
    assert tree.end_status("7 (a) b) " + " ".join([*fields, "0"])) is None
    fields[6] = str(0x400000 | tree.PF_EXITING)
    assert tree.end_status("7 (a) b) " + " ".join([*fields, "9"])) == 9
    assert tree.end_status("7 (a) " + " ".join(["Z", *fields[1:], "256"])) == 256
    assert tree.end_status("") is None

"""`sgnode doctor` on real faults: a port that is taken, a shard that is gone, a full disk, few descriptors, no etcd."""

import json
import os
import resource
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from procs.cli.doctor import command, discovery, disk, leftovers, limits, network, ports
from procs.cli.doctor.finding import Level
from procs.cli.doctor.ports import Port
from procs.cli.doctor.subject import Subject
from procs.cli.main import run
from shared.config import RUNTIME_DIR_VARIABLE
from tests.etcd import Etcd
from tests.harness import SGNODE

Row = dict[str, str]


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        yield held.getsockname()[1]


@pytest.fixture
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the synthetic engine takes for a model, with one empty shard."""
    made = tmp_path_factory.mktemp("model")
    for name in ("config.json", "tokenizer.json"):
        (made / name).write_text("{}")
    (made / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    return made


@pytest.fixture
def synthetic(tmp_path: Path, model: Path) -> list[str]:
    """Flags of a node that could be started: its runtime directory and ports are free."""
    return [str(model), "--synthetic", "", "--runtime-dir", str(tmp_path / "run"), "--http-port", "0", "--system-port", "0"]


def doctor(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, list[Row]]:
    """Exit code, and what is not ok."""
    capsys.readouterr()
    code = run(["doctor", *argv, "--json"])
    found: list[Row] = json.loads(capsys.readouterr().out)
    assert all(set(each) == {"level", "check", "found", "todo"} for each in found)
    return code, [each for each in found if each["level"] != "ok"]


def errors(rows: list[Row]) -> list[str]:
    return [f"{each['check']}: {each['found']}" for each in rows if each["level"] == "error"]


def test_a_start_that_would_go_well_leaves_nothing(
    capsys: pytest.CaptureFixture[str], synthetic: list[str], tmp_path: Path
) -> None:
    code, rows = doctor(capsys, *synthetic)
    assert code == 0 and errors(rows) == []
    assert list(tmp_path.iterdir()) == []


def test_a_taken_port_is_named_with_who_has_it(capsys: pytest.CaptureFixture[str], synthetic: list[str], taken: int) -> None:
    code, rows = doctor(capsys, *synthetic[:-1], str(taken))
    [found] = errors(rows)
    assert code == 4 and f"--system-port {taken} on 127.0.0.1 is held by pid {os.getpid()} (" in found


def test_an_address_that_is_not_here() -> None:
    [found] = ports.free(Port("--http-port", "192.0.2.1", 8000), [])
    assert found.level is Level.ERROR and "not an address of this machine" in found.found


def test_a_shard_that_is_gone(capsys: pytest.CaptureFixture[str], synthetic: list[str], model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    index = {"weight_map": {"w": "model-00001-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    code, rows = doctor(capsys, str(copy), *synthetic[1:])
    assert code == 4 and errors(rows) == [f"model: {copy}/model-00001-of-00002.safetensors: missing"]


def test_a_wrong_group_address(capsys: pytest.CaptureFixture[str], synthetic: list[str]) -> None:
    group = ["--nnodes", "2", "--tp-size", "2", "--dist-init-addr"]
    code, rows = doctor(capsys, *synthetic, *group, "192.0.2.1:20000")
    assert code == 4 and any("192.0.2.1 is not an address of this machine, and this is rank 0" in each for each in errors(rows))
    assert any("--group-key-file" in each["found"] for each in rows)
    code, rows = doctor(capsys, *synthetic, *group, "no-such-host.invalid:20000")
    assert code == 4 and any("no-such-host.invalid is not known here" in each for each in errors(rows))


def test_a_follower_whose_leader_is_not_there_yet_is_warned(
    capsys: pytest.CaptureFixture[str], synthetic: list[str], taken: int
) -> None:
    group = ["--nnodes", "2", "--tp-size", "2", "--node-rank", "1", "--dist-init-addr"]
    code, rows = doctor(capsys, *synthetic, *group, "127.0.0.1:20000", "--group-port", "1")
    assert code == 0 and any("nobody answers at 127.0.0.1:1 yet" in each["found"] for each in rows)
    code, rows = doctor(capsys, *synthetic, *group, "127.0.0.1:20000", "--group-port", str(taken))
    assert code == 0 and not any("nobody answers" in each["found"] for each in rows)


def test_what_serve_refuses_is_a_finding_and_the_rest_is_looked_at(
    capsys: pytest.CaptureFixture[str], synthetic: list[str]
) -> None:
    code, rows = doctor(capsys, "/no/such/model", *synthetic[3:])
    assert code == 4 and errors(rows) == ["configuration: MODEL /no/such/model: no such directory"]
    code, rows = doctor(capsys, *synthetic, "--nnodes", "2")
    assert code == 4 and len(errors(rows)) == 1 and "--dist-init-addr" in errors(rows)[0]
    assert run(["doctor", *synthetic, "--agents", "none"]) == 2 and "--agents" in capsys.readouterr().err


def test_a_directory_that_is_not_a_nodes(capsys: pytest.CaptureFixture[str], synthetic: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").touch()
    code, rows = doctor(capsys, *synthetic)
    assert code == 4 and "thesis.txt" in errors(rows)[0]
    deep = str(tmp_path / ("d" * 100))
    code, rows = doctor(capsys, *(deep if word.endswith("/run") else word for word in synthetic))
    assert code == 4 and "socket" in errors(rows)[0]


def test_no_node_of_that_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, rows = doctor(capsys, "--runtime-dir", str(tmp_path))
    assert code == 4 and errors(rows) == [f"node: no node is running in {tmp_path}"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a file system")
def test_a_full_disk(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(small)], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"can't mount here: {mounted.stderr.decode()}")
    try:
        looked = Subject({}, small / "run")
        assert [each.level for each in disk.check(looked) if each.check == "disk"] == [Level.WARNING]
        subprocess.run(["fallocate", "-l", "150m", str(small / "full")], check=True)
        assert os.statvfs(small).f_bavail * os.statvfs(small).f_frsize < 60e6
        [found] = [each for each in disk.check(looked) if each.check == "disk"]
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert found.level is Level.ERROR and f"{small} (tmpfs): 0.05 GB free of 0.21" in found.found


def test_few_descriptors_in_a_shell(tmp_path: Path) -> None:
    command_line = ["prlimit", "--nofile=1024:2048", SGNODE, "doctor", "--json", "--runtime-dir", str(tmp_path)]
    done = subprocess.run(command_line, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 4 and "open files: 2048 at most, supervisord needs 4096" in done.stdout


def test_few_descriptors_of_a_process_that_runs() -> None:
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        resource.prlimit(sleeper.pid, resource.RLIMIT_NOFILE, (3000, 3000))
        found = limits.facts(sleeper.pid)
        sleeper.kill()
    assert found.nofile == (3000, 3000)


def test_interfaces_of_this_host() -> None:
    here = network.interfaces()
    assert here["lo"].up and "127.0.0.1" in here["lo"].addresses


def test_the_file_store(tmp_path: Path) -> None:
    assert discovery.file_store(tmp_path / "made" / "later").level is Level.OK
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        assert discovery.file_store(tmp_path / "made" / "later").level is Level.ERROR


@pytest.mark.skipif(shutil.which("etcd") is None, reason="needs etcd-server")
def test_etcd_gives_a_lease_and_gets_it_back(tmp_path: Path, taken: int) -> None:
    def leases() -> list[Any]:
        from shared import etcd

        with etcd.connected(store.url, {}) as post:
            return list(post("/v3/lease/leases", {}).get("leases", []))

    with Etcd(tmp_path) as store:
        assert [each.level for each in discovery.etcd_cluster({"ETCD_ENDPOINTS": store.url})] == [Level.OK]
        assert leases() == []
        both = list(discovery.etcd_cluster({"ETCD_ENDPOINTS": f"{store.url},http://127.0.0.1:1"}))
        assert [each.level for each in both] == [Level.WARNING, Level.OK]
        assert not discovery.in_etcd(12345, {"ETCD_ENDPOINTS": store.url})
    [found] = discovery.etcd_cluster({"ETCD_ENDPOINTS": store.url})
    assert found.level is Level.ERROR and "refused" in found.found
    [silent] = discovery.etcd_cluster({"ETCD_ENDPOINTS": f"http://127.0.0.1:{taken}"})
    assert silent.level is Level.ERROR and "timed out" in silent.found


def test_nats(taken: int) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"INFO {}\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        port = server.getsockname()[1]
        assert discovery.nats(f"nats://127.0.0.1:{port}").level is Level.OK
        thread.join(5)
    refused = discovery.nats(f"nats://127.0.0.1:{port}")
    assert refused.level is Level.ERROR and "refused" in refused.found


def test_processes_of_a_node_that_is_gone(tmp_path: Path) -> None:
    environ = {**os.environ, RUNTIME_DIR_VARIABLE: str(tmp_path), leftovers.INCARNATION_VARIABLE: "3"}
    with subprocess.Popen([sys.executable, "-c", "print('up', flush=True); input()"], env=environ, stdin=-1, stdout=-1) as left:
        assert left.stdout is not None and left.stdout.readline() == b"up\n"
        [found] = leftovers.processes(Subject({}, tmp_path))
        assert found.level is Level.WARNING and f"pid {left.pid} (" in found.found
        left.kill()
    assert list(leftovers.processes(Subject({}, tmp_path))) == []


def test_shared_memory_that_a_process_has_is_no_leftover(tmp_path: Path) -> None:
    path = tmp_path / "sglang_loads_1.shm"
    with path.open("wb"):
        assert leftovers.unused(tmp_path, leftovers.mapped(tmp_path)) == []
    assert [each.path for each in leftovers.unused(tmp_path, leftovers.mapped(tmp_path))] == [path]


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--help"]) == 0 and "in place of `serve`" in capsys.readouterr().out
    assert command.CHECKS[0][0] == "node"


def test_it_starts_fast_because_it_imports_neither_torch_nor_sglang() -> None:
    code = "import sys, procs.cli.doctor.command; print({'torch', 'sglang', 'dynamo', 'pynvml'} & set(sys.modules) or 'none')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "none\n"

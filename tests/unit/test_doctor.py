"""`sgnode doctor`: what each check says of what it may find, from made-up facts."""

import dataclasses
import hashlib
import json
import struct
import sys
import threading
from collections.abc import Iterable
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from procs.cli.doctor import (
    clock,
    deadline,
    discovery,
    disk,
    finding,
    gpu,
    leftovers,
    limits,
    memory,
    model,
    network,
    nvml,
    ports,
    running,
    unit,
    versions,
)
from procs.cli.doctor.finding import Finding, Level
from procs.cli.doctor.subject import Subject
from procs.cli.install_unit import UNIT, text
from shared.config import Dynamo, NodeConfig, Synthetic
from shared.registrations import Registration

GIB = 1 << 30


def subject(*argv: str, environ: dict[str, str] | None = None, **fields: Any) -> Subject:
    config = NodeConfig(
        name="n", runtime_dir="/nowhere/n", version="0.1.0", role=fields.pop("role", "aggregated"), model_path="/m",
        served_model_name="m", worker_argv=list(argv), **fields,
    )  # fmt: skip
    return Subject(environ or {}, Path("/nowhere/n"), config)


def wrong(found: Iterable[Finding]) -> list[tuple[str, str]]:
    """Level and words of what is not ok; each says what to do."""
    bad = [each for each in found if each.level is not Level.OK]
    assert all(each.todo for each in bad)
    return [(each.level.value, each.found) for each in bad]


def only(found: Iterable[Finding], level: str, *words: str) -> None:
    """One finding that is not ok, of this level, with these words in it."""
    [(is_level, says)] = wrong(found)
    assert is_level == level and all(word in says for word in words), (is_level, says)


# --- the frame --------------------------------------------------------------------------------------------------------


def test_a_check_that_hangs_or_fails_is_a_finding_and_the_others_are_there() -> None:
    never = threading.Event()

    def hangs(_: Subject) -> Iterable[Finding]:
        never.wait()
        return []

    def fails(_: Subject) -> Iterable[Finding]:
        raise PermissionError(13, "Permission denied")

    checks = [("slow", hangs), ("closed", fails), ("good", lambda _: [finding.ok("good", "fine")])]
    found = deadline.run(checks, Subject({}), 0.2)
    never.set()
    assert [(each.level, each.check) for each in found] == [(Level.ERROR, "slow"), (Level.ERROR, "closed"), (Level.OK, "good")]
    assert "no answer within 0.2 s" in found[0].found and "Permission denied" in found[1].found


def test_a_program_that_does_not_answer_is_ended() -> None:
    with pytest.raises(TimeoutError, match=r"sleep: no answer within 0\.1 s"):
        deadline.ask(["sleep", "61.7"], 0.1)
    assert not [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE and "61.7" in p.cmdline()]
    with pytest.raises(ChildProcessError, match="no such"):
        deadline.ask(["sh", "-c", "echo no such thing >&2; exit 3"], 5)


def test_table_summary_and_exit_code() -> None:
    found = [finding.ok("a", "x" * 150), finding.warning("bb", "why", "do"), finding.error("c", "bad", "this")]
    lines = finding.render(found).splitlines()
    assert lines[0].split() == ["LEVEL", "CHECK", "FOUND", "DO"] and lines[2].endswith("why    do")
    assert lines[-1] == "1 error, 1 warning" and len(lines) == 6
    assert finding.exit_code(found) == 4 and finding.exit_code(found[:2]) == 0
    assert finding.summary(found[:1]) == "nothing wrong"


# --- GPUs -------------------------------------------------------------------------------------------------------------


def gpus(count: int, **fields: Any) -> list[gpu.Gpu]:
    return [gpu.Gpu(i, name="NVIDIA H100", uuid=f"GPU-{i}abc", total_mib=81559, **fields) for i in range(count)]


def test_without_a_gpu_cpu_mode_is_right_only_where_it_is_installed_or_asked_for() -> None:
    assert gpu.without(None, ("2.13.0+cpu", None), False).level is Level.OK
    assert gpu.without("cpu", ("2.13.0", "13.0"), True).level is Level.OK
    only([gpu.without(None, ("2.11.0", "13.0"), False)], "warning", "built for CUDA 13.0")
    only([gpu.without("cuda", ("2.11.0", "13.0"), False)], "error", "--device cuda")
    only([gpu.without(None, None, False)], "error", "torch is not installed")


@pytest.mark.parametrize(
    ("driver", "build", "level"),
    [
        ((13, 0), "13.0", None),
        ((13, 0), "12.9", None),
        ((12, 4), "12.9", "warning"),
        ((12, 4), "13.0", "error"),
        ((13, 0), None, "error"),
    ],
)
def test_torchs_cuda_against_the_drivers(driver: tuple[int, int], build: str | None, level: str | None) -> None:
    facts = gpu.Facts("580.1", gpus(2), driver)
    found = wrong(gpu.host(facts, ("2.11.0", build), on_cpu=False))
    assert [each[0] for each in found] == ([level] if level else [])


def test_broken_gpus_are_named() -> None:
    def says(**fields: Any) -> str:
        [(_, words)] = wrong(gpu.host(gpu.Facts("580.1", [gpu.Gpu(3, **fields)], (13, 0)), ("2.11.0", "13.0"), on_cpu=False))
        return words

    assert "GPU 3 is lost: fell off the bus" in says(lost="fell off the bus")
    assert "7 uncorrected" in says(ecc_uncorrected=7)
    assert "could not be remapped" in says(remap_failed=True)
    assert "waits to be remapped" in says(remap_pending=True)
    assert "MIG" in says(mig=True)
    assert "persistence mode is off on GPU 3" in says(persistence=0)
    only(gpu.host(gpu.Facts("580.1", [], (13, 0)), ("2.11.0", "13.0"), on_cpu=False), "error", "sees none")


@pytest.mark.parametrize(
    ("variable", "indices"),
    [(None, [0, 1, 2, 3]), ("2,0", [2, 0]), ("GPU-1", [1]), ("", []), ("1,9,0", [1]), ("-1", [])],
)
def test_what_cuda_visible_devices_shows(variable: str | None, indices: list[int]) -> None:
    assert [each.index for each in gpu.visible(gpus(4), variable)] == indices


def test_which_gpus_the_sizes_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("procs.cli.serve.has_gpu", lambda: True)
    assert gpu.ordinals(subject(tp_size=4)) == [0, 1, 2, 3]
    assert gpu.ordinals(subject("--base-gpu-id", "4", "--gpu-id-step=2", tp_size=2)) == [4, 6]
    assert gpu.ordinals(subject(tp_size=16, nnodes=2, node_rank=1)) == list(range(8))
    assert gpu.ordinals(subject(tp_size=8, pp_size=2, nnodes=2)) == list(range(8))
    assert gpu.ordinals(subject(tp_size=2, pp_size=2)) == [0, 1, 2, 3]
    assert gpu.ordinals(subject(tp_size=2, dp_size=2)) == [0, 1, 2, 3], "replicas"
    legacy = {"enable_dp_attention": "True", "attn_dp_size": "1"}
    assert gpu.ordinals(subject(tp_size=4, dp_size=4, group_facts=legacy)) == [0, 1, 2, 3], "they share the TP group"
    assert gpu.ordinals(subject(tp_size=4, group_facts={"attn_dp_size": "4"})) == [0, 1, 2, 3]
    assert wrong(gpu.sizes(subject(tp_size=4), 4)) == []
    only(gpu.sizes(subject(tp_size=8), 4), "error", "takes GPU 0 to 7, of 4 visible")
    only(gpu.sizes(subject(tp_size=4, environ={"CUDA_VISIBLE_DEVICES": "0"}), 1), "error", "CUDA_VISIBLE_DEVICES=0")
    only(gpu.sizes(subject(tp_size=3, nnodes=2), 8), "error", "can't be divided")
    only(gpu.sizes(subject("--gpu-id-step", "0", tp_size=2), 8), "error", "two schedulers on one GPU")
    only(gpu.sizes(subject("--device", "cpu", tp_size=4096), 0), "warning", "4096 schedulers")


def test_memory_that_others_hold() -> None:
    busy = gpus(1, holders=[(1, 9000)])
    only(gpu.holders(subject(), busy), "warning", "GPU 0: 9000 MiB", "pid 1 (")
    only(gpu.holders(subject(), gpus(1, used_mib=40_000)), "warning", "40000 MiB", "not listed")
    assert wrong(gpu.holders(subject(), gpus(1, used_mib=480))) == [], "the driver's own"


def test_nvidia_smi_where_nvml_is_missing() -> None:
    csv = "0, NVIDIA H100 80GB HBM3, GPU-79a8, 81559, 0, Disabled, Enabled, 580.159.04\n"
    csv += "1, N, GPU-2, [N/A], 0, [N/A], [N/A], 580.159.04\n"
    found = nvml.by_smi(csv)
    assert found["driver"] == "580.159.04" and found["cuda"] is None
    assert [(g["total_mib"], g["persistence"], g["mig"]) for g in found["gpus"]] == [(81559, 0, True), (0, None, False)]


def test_weights_against_gpu_memory() -> None:
    assert wrong(memory.against_gpu(81559, 140 * GIB, 4, changed=False)) == []
    only(memory.against_gpu(81559, 140 * GIB, 1, changed=False), "error", "140.0 GiB of weights a GPU, which has 79.6")
    only(memory.against_gpu(81559, 140 * GIB, 1, changed=True), "warning", "before quantisation")
    assert list(memory.against_gpu(None, 140 * GIB, 1, changed=False)) == []


# --- the host ---------------------------------------------------------------------------------------------------------


def test_interfaces() -> None:
    here = {"lo": network.Interface(True), "eth0": network.Interface(True, 9000), "ib0": network.Interface(False)}

    def says(**environ: str) -> list[tuple[str, str]]:
        return wrong(network.named_interfaces(environ, here))

    assert says() == [] and says(NCCL_SOCKET_IFNAME="eth") == [] and says(NCCL_SOCKET_IFNAME="^ib,lo") == []
    assert says(NCCL_SOCKET_IFNAME="=eth0", GLOO_SOCKET_IFNAME="eth0") == []
    assert says(NCCL_SOCKET_IFNAME="bond0") == [("error", "NCCL_SOCKET_IFNAME=bond0: no such interface")]
    assert says(GLOO_SOCKET_IFNAME="eth") == [("error", "GLOO_SOCKET_IFNAME=eth: no such interface")], "gloo takes whole names"
    assert says(NCCL_SOCKET_IFNAME="=eth") == [("error", "NCCL_SOCKET_IFNAME==eth: no such interface")]
    assert says(NCCL_SOCKET_IFNAME="ib0") == [("error", "NCCL_SOCKET_IFNAME=ib0: ib0 is down")]


def test_infiniband(tmp_path: Path) -> None:
    for name, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        (tmp_path / name / "ports" / "1").mkdir(parents=True)
        (tmp_path / name / "ports" / "1" / "state").write_text(state)
    devices = network.infiniband(tmp_path)
    assert devices == {"mlx5_0": True, "mlx5_1": False}
    assert wrong(network.rdma(devices, "mlx5_0:1", ["mlx5_0"])) == []
    only(network.rdma(devices, "mlx5_9", []), "error", "no device mlx5_9")
    only(network.rdma(devices, "", ["mlx5_7"]), "error", "--disaggregation-ib-device", "mlx5_7")
    only(network.rdma(devices, "", ["mlx5_1"]), "error", "mlx5_1: no active port")
    assert wrong(network.rdma({}, "", [])) == []


def test_the_leaders_address() -> None:
    own = {"10.0.0.1": "eth0", "127.0.0.1": "lo"}
    assert wrong(network.placed(0, "head", ["10.0.0.1"], own)) == [] == wrong(network.placed(1, "head", ["10.0.0.9"], own))
    only(network.placed(0, "head", ["10.0.0.9"], own), "error", "not an address of this machine")
    only(network.placed(1, "head", ["10.0.0.1"], own), "warning", "this is rank 1")
    only(network.placed(0, "localhost", ["127.0.0.1", "::1"], own), "warning", "loopback")


def numbers(found: Subject) -> dict[str, list[int]]:
    named: dict[str, list[int]] = {}
    for port in ports.wanted(found):
        named.setdefault(port.flag, []).append(port.number)
    return named


def test_every_port_that_a_node_binds() -> None:
    assert numbers(subject(http_port=8000, system_port=9090)) == {"--http-port": [8000], "--system-port": [9090]}
    assert numbers(subject(http_port=0, system_port=0, frontend=False)) == {}
    shared = {"attn_dp_size": "2"}
    events = ("--kv-events-config", '{"publisher": "zmq", "endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:5657"}')
    group = {"nnodes": 2, "dist_init_addr": "10.0.0.1:20000", "group_port": 20100, "frontend": False, "tp_size": 2}
    leader = numbers(subject(*events, group_facts=shared, dynamo=Dynamo(use_kv_events=True), **group))
    assert leader["--dist-init-addr"] == [20000] and leader["--group-port"] == [20100]
    assert leader["--dist-init-addr's, for DP attention"] == [20001, 20002, 20003, 20004, 20005, 20006]
    assert leader["--kv-events-config endpoint"] == [5557] and leader["--kv-events-config replay_endpoint"] == [5657]
    follower = numbers(subject(*events, group_facts=shared, dynamo=Dynamo(use_kv_events=True), node_rank=1, **group))
    assert (
        follower["--kv-events-config endpoint"] == [5558]
        and "--group-port" not in follower
        and "--dist-init-addr" not in follower
    )
    alone = numbers(subject("--port", "31000", tp_size=2, group_facts=shared))
    assert alone["--port's, for DP attention"] == [31234, 31235, 31236, 31237, 31238, 31239]
    replicas = numbers(subject(dp_size=2, tp_size=1, dynamo=Dynamo(use_kv_events=True)))
    assert replicas["--kv-events-config endpoint"] == [5557, 5558]
    prefill = numbers(subject("--disaggregation-bootstrap-port", "8998", role="prefill"))
    assert prefill["--disaggregation-bootstrap-port"] == [8998]


def test_two_flags_that_take_one_port() -> None:
    taken = [ports.Port("--http-port", "127.0.0.1", 5557), ports.Port("--kv-events-config endpoint", "0.0.0.0", 5557)]
    only(ports.doubled(taken), "error", "5557 is both --http-port and --kv-events-config endpoint")
    assert list(ports.doubled([ports.Port("a", "10.0.0.1", 1), ports.Port("b", "10.0.0.2", 1)])) == []


def test_limits() -> None:
    good = limits.Facts((4096, 1 << 20), (8 << 20, 8 << 20), (-1, -1), (0, 0))

    def says(pinned: bool = False, gpus: bool = False, **fields: Any) -> list[tuple[str, str]]:
        return wrong(limits.judge(dataclasses.replace(good, **fields), pinned=pinned, gpus=gpus))

    unlimited = {"nofile": (1 << 20, 1 << 20)}
    assert says(**unlimited) == []
    assert says(nofile=(1024, 2048)) == [("error", "open files: 2048 at most, supervisord needs 4096")]
    assert [each[0] for each in says(nofile=(1024, 1 << 20))] == ["warning"]
    assert says(pinned=True, **unlimited) == [("warning", "locked memory: 8 MiB; RDMA and pinned host memory need more")]
    assert says(pinned=True, may_lock=True, **unlimited) == [] == says(pinned=True, memlock=(-1, -1), **unlimited)
    assert says(nproc=(100, 100), **unlimited)[0] == ("error", "processes: 100 at most, supervisord needs 200")
    assert [each[0] for each in says(nproc=(1000, 1000), **unlimited)] == ["warning"]
    assert says(nproc=(1000, 1000), is_root=True, **unlimited) == []
    assert [each[0] for each in says(pids_max=512, **unlimited)] == ["warning"]
    assert [each[0] for each in says(gpus=True, core=(-1, -1), **unlimited)] == ["warning"]


def test_the_tightest_limit_of_a_cgroup(tmp_path: Path) -> None:
    inner = tmp_path / "slice" / "service"
    inner.mkdir(parents=True)
    assert limits.lowest(inner, "pids.max") is None is limits.lowest(None, "pids.max")
    (inner / "pids.max").write_text("max\n")
    (inner.parent / "pids.max").write_text("100\n")
    assert limits.lowest(inner, "pids.max") == 100
    (inner / "pids.max").write_text("7\n")
    assert limits.lowest(inner, "pids.max") == 7


def test_memory_and_shared_memory() -> None:
    plenty = memory.Facts(64 * GIB)
    assert wrong(memory.host(plenty, loaded=True, gpus=True)) == []
    only(memory.host(memory.Facts(64 * GIB, limit=GIB // 2), loaded=False, gpus=False), "error", "0.5 in this cgroup")
    only(memory.host(memory.Facts(64 * GIB, swap_used=3, swap_total=4), loaded=True, gpus=False), "warning", "swap")
    only(memory.host(memory.Facts(64 * GIB, overcommit="2"), loaded=False, gpus=True), "warning", "overcommit")
    assert wrong(memory.shared((8 * GIB, 8 * GIB), 8)) == []
    only(memory.shared((64 << 20, 64 << 20), 2), "error", "0.06 GiB free")
    only(memory.shared((64 << 20, 64 << 20), 1), "warning", "0.06 GiB free")
    only(memory.shared(None, 1), "error", "missing")
    big = model.Weights(bytes=140 * GIB)
    only(memory.against_host(plenty, big, 1, on_cpu=True, hicache=0), "error", "140.0 GiB of weights, 64.0 GiB")
    assert wrong(memory.against_host(plenty, big, 8, on_cpu=False, hicache=0)) == []
    only(memory.against_host(memory.Facts(16 * GIB), big, 8, on_cpu=False, hicache=0), "warning", "schedulers on this node: 8")
    only(memory.against_host(plenty, big, 8, on_cpu=False, hicache=400 * GIB), "error", "--hicache-size takes 400 GiB")


def test_clock() -> None:
    assert clock.judge(1500, 1).level is Level.OK
    only([clock.judge(16_000_000, 1)], "warning", "not synchronised")
    only([clock.judge(16_000_000, 2)], "warning", "don't start")
    assert clock.max_error_us() >= 0


def test_disk() -> None:
    room = disk.Room(Path("/run/x"), 10**9, 10**10, 5, "tmpfs", True)
    assert wrong(disk.judge(room, 10**8)) == []
    only(disk.judge(room, 2 * 10**9), "warning", "/run/x (tmpfs): 1.00 GB free of 10.00")
    only(disk.judge(disk.Room(room.path, 10**7, 10**10, 5, "ext4", True), 0), "error", "0.01 GB free")
    only(disk.judge(disk.Room(room.path, 10**9, 10**10, 0, "ext4", True), 0), "error", "no inode")
    only(disk.judge(disk.Room(room.path, 10**9, 10**10, 5, "ext4", False), 0), "error", "can't be written")


def test_versions() -> None:
    tested = {"sglang": "0.5.23", "ai-dynamo": "1.6.1", "ai-dynamo-runtime": "1.6.1"}
    assert wrong(versions.judge(tested, on_cpu=True)) == []
    only(versions.judge(tested, on_cpu=False), "warning", "sglang 0.5.23: tested on a GPU host with 0.5.16")
    only(versions.judge({**tested, "ai-dynamo": "1.7.0"}, on_cpu=True), "warning", "ai-dynamo 1.7.0")
    only(
        versions.judge({name: tested[name] for name in tested if name != "sglang"}, on_cpu=True),
        "error",
        "sglang is not installed",
    )


def test_the_systemd_unit(tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.touch()
    mine = text(UNIT, python, "sgnode")
    assert wrong(unit.whose(mine, python)) == []
    only(unit.whose(mine, tmp_path / "other" / "python"), "warning", f"starts {python}")
    only(unit.whose(mine.replace("TimeoutStopSec=60", "TimeoutStopSec=5"), python), "warning", "not the one of this version")
    only(unit.whose(text(UNIT, tmp_path / "gone" / "python", "sgnode"), python), "error", "isn't there")
    good = {"KillMode": "mixed", "NotifyAccess": "main", "Delegate": "yes", "Type": "notify", "TimeoutStopUSec": "1min"}
    assert wrong(unit.settings({**good, "NeedDaemonReload": "no"})) == [] == wrong(unit.settings({"TimeoutStopUSec": "infinity"}))
    only(unit.settings({**good, "TimeoutStopUSec": "10s"}), "error", "TimeoutStopSec=10")
    only(unit.settings({**good, "KillMode": "control-group"}), "error", "no stream finishes")
    only(unit.settings({**good, "Delegate": "no"}), "error", "cgroup")
    only(unit.settings({**good, "NeedDaemonReload": "yes"}), "warning", "not read again")
    assert unit.seconds("1min 30s") == 90 and unit.seconds("500ms") == 0.5


# --- the model --------------------------------------------------------------------------------------------------------


def shard(path: Path, size: int = 64) -> None:
    header = json.dumps({"__metadata__": {}, "w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for name in names:
        shard(tmp_path / name)
    index = {"weight_map": {f"w{i}": name for i, name in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def looked(directory: Path) -> Iterable[Finding]:
    return model.complete(directory, needs_weights=True, needs_tokenizer=True)


def test_a_whole_model(sharded: Path) -> None:
    assert wrong(looked(sharded)) == [] and model.weights(sharded).files == 3


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    only(looked(sharded), "error", "model-00002-of-00003.safetensors: missing")


def test_a_shard_that_is_cut_off(sharded: Path) -> None:
    path = sharded / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    only(looked(sharded), "error", "its header says")
    path.write_bytes(b"")
    only(looked(sharded), "error", "cut off: 0 bytes")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    only(looked(sharded), "error", "Git LFS pointer")
    path.write_bytes(struct.pack("<Q", 10) + b"not a json")
    only(looked(sharded), "error", "header can't be read")


def test_missing_files_of_a_model(sharded: Path) -> None:
    (sharded / "tokenizer.json").unlink()
    only(looked(sharded), "error", "no tokenizer")
    (sharded / "qwen.tiktoken").touch()
    (sharded / "config.json").write_text("[")
    only(looked(sharded), "error", "config.json: ")
    (sharded / "config.json").unlink()
    only(looked(sharded), "error", "config.json is missing")
    (sharded / "config.json").write_text("{}")
    for path in sharded.glob("*.safetensors*"):
        path.unlink()
    only(looked(sharded), "error", "no weights")
    (sharded / "pytorch_model.bin").touch()
    assert wrong(looked(sharded)) == []


def hub(name: str, **environ: str) -> Iterable[Finding]:
    made = subject(environ=environ)
    assert made.config is not None
    return model.check(dataclasses.replace(made, config=msgspec.structs.replace(made.config, model_path=name)))


def test_a_model_of_a_hub(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    cache = tmp_path_factory.mktemp("hub")
    only(hub("owner/it", HF_HUB_CACHE=str(cache)), "warning", "downloads it while it loads")
    only(hub("owner/it", HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE="1"), "error", "HF_HUB_OFFLINE")
    repository = cache / "models--owner--it"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / "abc").symlink_to(sharded)
    assert wrong(hub("owner/it", HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE="1")) == []
    (sharded / "model-00001-of-00003.safetensors").unlink()
    only(hub("owner/it", HF_HUB_CACHE=str(cache)), "error", "missing")
    only(hub("/not/there"), "error", "no such directory")
    assert wrong(hub("s3://bucket/it")) == []


# --- a node that runs -------------------------------------------------------------------------------------------------


def test_states_of_the_node() -> None:
    assert wrong(running.state({"state": "ready", "since": 1.0})) == []
    only(running.state({"state": "failed", "reason": "died 5 times"}), "error", "failed: died 5 times")
    only(running.state({"state": "unhealthy", "reason": "no canary"}), "error", "unhealthy")
    only(running.state({"state": "loading", "waiting_for": "weights"}), "warning", "loading; waiting for weights")
    [each] = running.state({"state": "drained"})
    assert "sgnode resume" in each.todo
    assert ("error", "its coordinator says nothing for 40s") in wrong(running.state({"state": "ready", "stale_s": 40}))


def test_processes() -> None:
    row = {"name": "relay", "pid": 7, "state": "ready", "restarts": 0, "detail": ""}
    assert wrong(running.process(row, "sleeping")) == []
    only(running.process(row, psutil.STATUS_STOPPED), "error", "pid 7 is stopped (SIGSTOP)")
    only(running.process(row, psutil.STATUS_DISK_SLEEP), "warning", "waits in the kernel")
    only(running.process({**row, "state": "lost"}, "running"), "error", "no sign of life")
    only(running.process({**row, "state": "failed", "detail": "exited too quickly"}, ""), "error", "exited too quickly")
    only(running.process({**row, "state": "waiting", "waiting_for": "etcd"}, "sleeping"), "warning", "waiting: etcd")
    only(running.process({**row, "restarts": 3}, "sleeping"), "warning", "restarted 3 times")
    only(running.process({**row, "numbers": {"dropped_frames": 4.0}}, "sleeping"), "warning", "4 frames that did not decode")
    closed = {**row, "name": "agent:0", "detail": "worker 1; the file store can't be written: /srv"}
    only(running.process(closed, "sleeping"), "error", "the file store can't be written: /srv")


def test_crashes_and_groups() -> None:
    last = {"at": 1000.0, "reason": "killed by SIGKILL", "path": "/run/x/log/crash-1"}
    only(running.crash({"last_crash": last}, 1060.0), "warning", "1m00s ago: killed by SIGKILL")
    assert list(running.crash({"last_crash": last}, 1000.0 + 2 * 86400)) == []
    ranks = [{"node_rank": 1, "seen_s": 0.1}, {"node_rank": 2, "seen_s": None}]
    only(running.group({"group": {"ranks": ranks, "differences": []}}), "error", "rank 2 is not heard")
    skew = "rank 1 (b): its clock is 9.0 s behind the leader's"
    [each] = running.group({"group": {"ranks": ranks[:1], "differences": [skew]}})
    assert each.level is Level.ERROR and each.found == skew and "timedatectl" in each.todo


def test_a_supervisord_that_does_not_answer() -> None:
    only(running.check(dataclasses.replace(subject(), supervisord=4_000_000)), "error", "does not answer")


def test_error_lines_of_the_last_day(tmp_path: Path) -> None:
    now = 1_795_540_000.0
    today, before = (datetime.fromtimestamp(now - age).strftime("%Y-%m-%d %H:%M:%S,000") for age in (60, 2 * 86400))
    (tmp_path / "relay.log").write_text(
        f"{before} ERROR relay: old\n{today} INFO relay: no ERROR said here at all, far from its start\n"
    )
    assert wrong(running.errors(tmp_path, now)) == []
    (tmp_path / "agent-0.log").write_text(f"{today} ERROR agent:0: first\n{today} ERROR agent:0: the agent ends\n")
    (tmp_path / "prober.log").write_text('{"time": "2020-01-01 00:00:00", "level": "INFO", "message": "an ERROR"}\n')
    only(running.errors(tmp_path, now), "warning", "agent-0.log: ERROR lines: 2, the last:", "the agent ends")


def test_lines_of_json() -> None:
    assert running.is_error('{"ts": 1, "level": "ERROR", "message": "x"}') and not running.is_error(
        '{"level": "INFO", "m": "ERROR"}'
    )


def test_records_in_discovery(tmp_path: Path) -> None:
    agent = Registration("agent:0", 0xABC, "file", str(tmp_path))
    assert not discovery.in_store(tmp_path, agent.worker_id)
    (tmp_path / "v1" / "instances").mkdir(parents=True)
    (tmp_path / "v1" / "instances" / "dynamo%2Fbackend%2Fgenerate%2F1abc").touch()
    assert not discovery.in_store(tmp_path, agent.worker_id), "another worker, whose id ends alike"
    (tmp_path / "v1" / "instances" / "dynamo%2Fbackend%2Fgenerate%2Fabc").touch()
    assert discovery.in_store(tmp_path, agent.worker_id)
    assert wrong(discovery.judge(True, [agent], [])) == []
    only(discovery.judge(True, [agent], [agent]), "error", "no record of agent:0 (worker 2748)")
    only(discovery.judge(True, [], []), "error", "no living agent")
    only(discovery.judge(False, [agent], [agent]), "warning", "not registered")


def test_leftovers(tmp_path: Path) -> None:
    (tmp_path / "sglang_loads_1.shm").write_bytes(bytes(8192))
    (tmp_path / "psm_2").touch()
    (tmp_path / "somebody-else").touch()
    found = leftovers.unused(tmp_path, {"psm_2"})
    assert [each.path.name for each in found] == ["sglang_loads_1.shm"] and found[0].size >= 8192
    assert leftovers.shared_memory(found).level is Level.OK
    only([leftovers.shared_memory([leftovers.File(tmp_path, 1 << 30)])], "warning", "1 files", "1073.7 MB")
    only(leftovers.stale_processes([1, 2, 3, 4], "kill"), "warning", "of a life that is over: pid 1", "and 1 more")


def test_temporary_files_of_earlier_engines(tmp_path: Path) -> None:
    for name in ("1", "2"):
        (tmp_path / "tmp" / name).mkdir(parents=True)
    (tmp_path / "incarnation").write_text("2\n")
    node = dataclasses.replace(subject(), directory=tmp_path, supervisord=1)
    only(leftovers.temporary(node), "warning", "temporary files of earlier engines: 1 in")
    assert list(leftovers.temporary(dataclasses.replace(node, supervisord=0))) == [], "serve removes them"
    (tmp_path / "tmp" / "1").rmdir()
    assert list(leftovers.temporary(node)) == []


def test_a_synthetic_node_needs_no_sglang() -> None:
    assert subject(synthetic=Synthetic()).on_cpu and not subject(synthetic=Synthetic()).running


# --- families put together --------------------------------------------------------------------------------------------


@pytest.fixture
def gpu_host(monkeypatch: pytest.MonkeyPatch) -> gpu.Facts:
    """A host with two GPUs, one of which another program uses."""
    facts = gpu.Facts("580.1", gpus(2), (13, 0))
    facts.gpus[1].holders = [(1, 9000)]
    monkeypatch.setattr("procs.cli.serve.has_gpu", lambda: True)
    monkeypatch.setattr(gpu, "facts", lambda _: facts)
    monkeypatch.setattr(gpu, "torch_build", lambda: ("2.11.0", "13.0"))
    return facts


def test_a_gpu_host(gpu_host: gpu.Facts, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wrong(gpu.check(subject())) == [], "GPU 1 is not wanted"
    only(gpu.check(subject(tp_size=2)), "warning", "GPU 1: 9000 MiB")
    only(gpu.check(subject(environ={"CUDA_VISIBLE_DEVICES": "1"})), "warning", "GPU 1: 9000 MiB")
    assert [each[0] for each in wrong(gpu.check(subject(tp_size=4)))] == ["error", "warning"], (
        "too few, and what is there is used"
    )
    assert wrong(gpu.check(subject("--device", "cpu", tp_size=1))) == []
    only(gpu.check(Subject({})), "warning", "GPU 1: 9000 MiB")
    assert gpu.smallest_mib(subject(tp_size=2)) == 81559 and gpu.smallest_mib(subject("--device", "cpu")) is None

    def fails(_: Subject) -> gpu.Facts:
        raise ChildProcessError("NVML: Driver/library version mismatch")

    monkeypatch.setattr(gpu, "facts", fails)
    only(gpu.check(subject()), "error", "version mismatch")
    assert gpu.smallest_mib(subject()) is None
    assert wrong(gpu.check(subject("--device", "cpu"))) == []


def test_weights_that_a_gpu_host_has_no_room_for(gpu_host: gpu.Facts, sharded: Path) -> None:
    size = 100 * GIB
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (sharded / "model-00001-of-00003.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)  # holes, no blocks
    assert wrong(looked(sharded)) == []

    def says(*argv: str, **fields: Any) -> list[tuple[str, str]]:
        made = subject(*argv, **fields)
        assert made.config is not None
        config = msgspec.structs.replace(made.config, model_path=str(sharded))
        found = memory.check(dataclasses.replace(made, config=config))
        return wrong(each for each in found if each.check == "gpu memory")

    assert says() == [("error", "100.0 GiB of weights a GPU, which has 79.6")] and says(tp_size=2) == []
    assert [each[0] for each in says("--quantization", "fp8")] == ["warning"]
    assert says("--load-format", "dummy") == [] == says(synthetic=Synthetic())


def test_ports_of_a_node_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Subject, "owns", lambda _, pid: pid == 7)
    port = ports.Port("--http-port", "127.0.0.1", 8000)
    node = dataclasses.replace(subject(), supervisord=1)
    assert wrong(ports.held(port, [7], node)) == [] == wrong(ports.held(port, [0], node))
    only(ports.held(port, [1], node), "error", "--http-port 8000 is held by pid 1 (", "not by this node")
    only(ports.held(port, [], node), "error", "nobody listens")
    assert list(ports.held(dataclasses.replace(port, needed=False), [], node)) == []
    assert numbers(subject("--nccl-port", "29500"))["--nccl-port"] == [29500]


def test_the_engines_cgroup(monkeypatch: pytest.MonkeyPatch) -> None:
    document = {"processes": [{"name": "engine", "pid": 7}]}
    node = dataclasses.replace(subject(), document=document, supervisord=1)
    groups = {"text": "0::/system.slice/sgnode@n.service\n"}
    monkeypatch.setattr(Path, "read_text", lambda path: groups["text"])
    assert wrong(running.cgroup(node)) == [], "nobody promised one"
    only(running.cgroup(dataclasses.replace(node, environ={"INVOCATION_ID": "1"})), "warning", "no cgroup of its own")
    name = "sgnode-" + hashlib.sha256(b"/nowhere/n").hexdigest()[:16]
    groups["text"] = f"0::/x/{name}\n"
    [found] = running.cgroup(dataclasses.replace(node, environ={"INVOCATION_ID": "1"}))
    assert found.level is Level.OK and name in found.found
    assert list(running.cgroup(dataclasses.replace(node, document={}))) == []


def test_a_node_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    own = str(Path(sys.prefix) / "bin" / "python")
    lines = {"command": own}
    monkeypatch.setattr(Path, "read_bytes", lambda path: f"{lines['command']}\0-m\0supervisor".encode())
    node = dataclasses.replace(subject(), supervisord=1)
    assert node.config is not None
    node = dataclasses.replace(node, config=msgspec.structs.replace(node.config, version=version("sgnode")))
    assert wrong(versions.runs_another(node)) == []
    lines["command"] = "/opt/sgnode-0.0.9/bin/python"
    only(versions.runs_another(node), "warning", "the node runs from /opt/sgnode-0.0.9/bin")
    older = dataclasses.replace(node, config=msgspec.structs.replace(node.config, version="0.0.9"))
    only(versions.runs_another(older), "warning", "started by sgnode 0.0.9")


def test_what_is_good_is_said_too(tmp_path: Path) -> None:
    tested = {"sglang": "0.5.23", "ai-dynamo": "1.6.1", "ai-dynamo-runtime": "1.6.1"}
    assert [each.level for each in versions.judge(tested, on_cpu=True)] == [Level.OK]
    assert [each.level for each in running.errors(tmp_path, 0.0)] == [Level.OK]
    node = dataclasses.replace(subject(), directory=tmp_path)
    assert [each.check for each in disk.check(node)] == ["runtime directory", "disk"], "one file system, one line"

"""GPUs: how many, whether the driver fits torch, what is broken, who else holds their memory, and what the flags ask of them."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distribution

import msgspec

from procs.cli import serve
from procs.cli.doctor.deadline import ask
from procs.cli.doctor.finding import Finding, error, ok, warning
from procs.cli.doctor.subject import Subject, named
from shared.config import NodeConfig

NVML_SECONDS = 8.0
"""Without the persistence daemon the driver takes a second a GPU."""
HELD_MIB = 512
"""More than this held by others, and SGLang's share of what is free is visibly smaller."""


class Gpu(msgspec.Struct):
    """None: this GPU doesn't have it, or it was not asked."""

    index: int
    lost: str = ""
    name: str = "?"
    uuid: str = ""
    total_mib: int = 0
    used_mib: int = 0
    persistence: int | None = None
    ecc_uncorrected: int | None = None
    remap_pending: bool | None = None
    remap_failed: bool | None = None
    mig: bool = False
    holders: list[tuple[int, int]] = []
    """pid and MiB."""


class Facts(msgspec.Struct):
    driver: str
    gpus: list[Gpu]
    cuda: tuple[int, int] | None = None
    """The newest CUDA that the driver runs."""


def facts(subject: Subject) -> Facts:
    """Ask the driver, in a child. Raises OSError with its words."""
    environ = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    try:
        text = ask([sys.executable, "-m", "procs.cli.doctor.nvml"], NVML_SECONDS, environ)
    except TimeoutError as late:
        raise TimeoutError(f"NVML: no answer within {NVML_SECONDS:g} s") from late
    return msgspec.json.decode(text, type=Facts)


def torch_build() -> tuple[str, str | None] | None:
    """torch's version and the CUDA that it was built for (None: a CPU build), from its files; None when it isn't installed."""
    try:
        found = distribution("torch")
        text = (found.locate_file("torch") / "version.py").read_text()  # type: ignore[attr-defined,unused-ignore]
    except (PackageNotFoundError, OSError):
        return None
    built = re.search(r"^cuda\b[^=\n]*=\s*'([0-9.]+)'", text, re.MULTILINE)
    return found.version, built[1] if built else None


def check(subject: Subject) -> Iterator[Finding]:
    build = torch_build()
    if not serve.has_gpu():
        yield without(subject.flag("--device"), build, subject.synthetic)
        yield from sizes(subject, 0) if subject.config is not None else ()
        return
    try:
        found = facts(subject)
    except (OSError, msgspec.MsgspecError) as failure:
        if subject.on_cpu:
            yield ok("gpu", f"the driver doesn't answer ({failure}); the engine asks for none")
        else:
            yield error(
                "gpu",
                f"the driver doesn't answer: {failure}",
                "`nvidia-smi`, `dmesg | grep -i nvrm`; reload the driver or reboot",
            )
        return
    yield from host(found, build, on_cpu=subject.on_cpu)
    seen = visible(found.gpus, subject.environ.get("CUDA_VISIBLE_DEVICES"))
    if subject.config is not None and not subject.on_cpu:
        yield from sizes(subject, len(seen))
    chosen = [seen[i] for i in ordinals(subject) if i < len(seen)] if subject.config is not None else found.gpus
    yield from holders(subject, [] if subject.on_cpu else chosen)


def without(device: str | None, build: tuple[str, str | None] | None, synthetic: bool) -> Finding:
    """No GPU here."""
    if synthetic:
        return ok("gpu", "none here, and the synthetic engine needs none")
    if device is not None and device != "cpu":
        return error(
            "gpu", f"none here, and --device {device} asks for one", "load the driver (`nvidia-smi`), or start without --device"
        )
    if build is None:
        return error("gpu", "none here, and torch is not installed", "`make setup`")
    version, cuda = build
    if cuda is not None:
        return warning("gpu", f"none here, but torch {version} is built for CUDA {cuda}", "is the driver loaded? `nvidia-smi`")
    return ok("gpu", f"none here: CPU mode, torch {version}")


def host(found: Facts, build: tuple[str, str | None] | None, *, on_cpu: bool) -> Iterator[Finding]:
    """The driver, torch's build, and what is broken."""
    kinds = sorted({f"{gpu.name}, {gpu.total_mib / 1024:.0f} GiB" for gpu in found.gpus if not gpu.lost})
    cuda = f", CUDA {found.cuda[0]}.{found.cuda[1]}" if found.cuda else ""
    if not found.gpus:
        yield error(
            "gpu", f"driver {found.driver} sees none", "`dmesg | grep -i nvrm`; in a container pass the GPUs (`--gpus all`)"
        )
    else:
        yield ok("gpu", f"{len(found.gpus)} x {' and '.join(kinds) or '?'}; driver {found.driver}{cuda}")
    if not on_cpu:
        yield from _build(found, build)
    for gpu in found.gpus:
        yield from _broken(gpu)
    off = [str(gpu.index) for gpu in found.gpus if gpu.persistence == 0]
    if off:
        words = f"persistence mode is off on GPU {', '.join(off)}: each start waits for the driver"
        yield warning("gpu", words, "`systemctl enable --now nvidia-persistenced`, or `nvidia-smi -pm 1`")


def _build(found: Facts, build: tuple[str, str | None] | None) -> Iterator[Finding]:
    """CUDA runs a newer minor version than the driver's, but not its compilers' PTX (CUDA compatibility guide)."""
    if build is None:
        yield error("torch", "not installed", "`make setup`")
        return
    version, cuda = build
    if cuda is None:
        yield error("torch", f"{version} is a CPU build on a GPU host", "`rm -r .venv && make setup`, or start with --device cpu")
        return
    if found.cuda is None:
        yield ok("torch", f"{version}, built for CUDA {cuda}; nvidia-ml-py is missing: whether the driver has it is not known")
        return
    wanted = tuple(int(part) for part in cuda.split(".")[:2])
    words = f"{version} is built for CUDA {cuda}, the driver {found.driver} has {found.cuda[0]}.{found.cuda[1]}"
    if wanted[0] > found.cuda[0]:
        yield error("torch", words, "a newer driver, or a torch for the driver's CUDA")
    elif wanted > found.cuda:
        yield warning("torch", f"{words}: kernels that are compiled at run time may fail", f"a driver with CUDA {cuda}")
    else:
        yield ok("torch", words)


def _broken(gpu: Gpu) -> Iterator[Finding]:
    name = f"GPU {gpu.index}"
    if gpu.lost:
        yield error("gpu", f"{name} is lost: {gpu.lost}", "`nvidia-smi -r`, or reboot; `dmesg | grep -i xid`")
    if gpu.ecc_uncorrected:
        yield error(
            "gpu",
            f"{name}: {gpu.ecc_uncorrected} uncorrected memory errors since the driver was loaded",
            f"drain it; `nvidia-smi -r -i {gpu.index}`",
        )
    if gpu.remap_failed:
        yield error("gpu", f"{name}: a row of its memory could not be remapped", "replace the GPU")
    if gpu.remap_pending:
        yield warning("gpu", f"{name}: a row of its memory waits to be remapped", f"drain it; `nvidia-smi -r -i {gpu.index}`")
    if gpu.mig:
        yield warning("gpu", f"{name} is cut up (MIG)", "name an instance in CUDA_VISIBLE_DEVICES, or `nvidia-smi -mig 0`")


def visible(gpus: Sequence[Gpu], variable: str | None) -> list[Gpu]:
    """What CUDA shows: CUDA_VISIBLE_DEVICES' indices or UUIDs, up to the first that isn't there (CUDA C++ programming guide)."""
    if variable is None:
        return list(gpus)
    shown: list[Gpu] = []
    for text in variable.split(","):
        word = text.strip()
        match = next((gpu for gpu in gpus if word and (word == str(gpu.index) or gpu.uuid.startswith(word))), None)
        # An instance of a cut-up GPU has a name that the driver's list doesn't have.
        if match is None and word.startswith("MIG-"):
            match = next((gpu for gpu in gpus if gpu.mig), None)
        if match is None:
            break
        shown.append(match)
    return shown


def dp_layout(config: NodeConfig) -> tuple[int, bool, int]:
    """DP ranks, whether they share one TP group's GPUs, and how many such groups (dynamo.sglang 1.6.1, capacity.py).

    SGLang 0.5.23 has the shared ones in attn_dp_size, versions before in dp_size with enable_dp_attention.
    """
    inner = int(config.group_facts.get("attn_dp_size", "1"))
    if inner > 1:
        return config.dp_size * inner, True, config.dp_size
    if config.group_facts.get("enable_dp_attention") == "True":
        return config.dp_size, True, 1
    return config.dp_size, False, config.dp_size


def ordinals(subject: Subject) -> list[int]:
    """The CUDA devices that this node's schedulers take (SGLang 0.5.23: engine.py, data_parallel_controller.py)."""
    config = subject.config
    assert config is not None
    base, step = subject.number("--base-gpu-id", 0), subject.number("--gpu-id-step", 1)
    nodes_a_stage = max(1, config.nnodes // config.pp_size)
    stages = max(1, config.pp_size // config.nnodes)
    ranks = max(1, config.tp_size // nodes_a_stage)
    copies = range(dp_layout(config)[2])
    return [
        base + copy * config.tp_size * config.pp_size * step + stage * ranks + rank * step
        for copy in copies
        for stage in range(stages)
        for rank in range(ranks)
    ]


def sizes(subject: Subject, count: int) -> Iterator[Finding]:
    """Parallel sizes against ``count`` visible GPUs."""
    config = subject.config
    assert config is not None
    ranks, shared, _ = dp_layout(config)
    words = f"tp {config.tp_size} x pp {config.pp_size}"
    words += f", {ranks} DP ranks share them" if shared else f" x dp {config.dp_size}" if config.dp_size > 1 else ""
    words += f", over {config.nnodes} nodes" if config.nnodes > 1 else ""
    if config.tp_size * config.pp_size % config.nnodes:
        yield error("parallel sizes", f"{words}: can't be divided", "--tp-size times --pp-size must be a multiple of --nnodes")
        return
    if subject.on_cpu:
        cores, schedulers = len(os.sched_getaffinity(0)), len(ordinals(subject))
        if schedulers > cores and not subject.synthetic:
            yield warning("parallel sizes", f"{words}: {schedulers} schedulers on {cores} cores", "smaller sizes")
        else:
            yield ok("parallel sizes", f"{words} on the CPU")
        return
    taken = ordinals(subject)
    shown = subject.environ.get("CUDA_VISIBLE_DEVICES")
    seen = f"{count} visible" + ("" if shown is None else f" (CUDA_VISIBLE_DEVICES={shown})")
    if max(taken) >= count:
        list_of = f"{taken[0]}" if len(taken) == 1 else f"{taken[0]} to {max(taken)}"
        yield error(
            "parallel sizes",
            f"{words}: takes GPU {list_of}, of {seen}",
            "smaller sizes, --base-gpu-id, --gpu-id-step or CUDA_VISIBLE_DEVICES",
        )
    elif len(set(taken)) < len(taken):
        yield error("parallel sizes", f"{words}: two schedulers on one GPU", "--gpu-id-step 1")
    else:
        yield ok("parallel sizes", f"{words}: {len(taken)} of {seen}")


def holders(subject: Subject, gpus: Sequence[Gpu]) -> Iterator[Finding]:
    """Other programs' memory on the GPUs that are wanted."""
    for gpu in gpus:
        others = [(pid, mib) for pid, mib in gpu.holders if not subject.owns(pid)]
        held = sum(mib for _, mib in others)
        # From inside a container, others' processes are not listed, their memory is.
        unknown = 0 if gpu.holders or subject.running else gpu.used_mib
        if held > HELD_MIB or unknown > 2 * HELD_MIB:
            who = ", ".join(f"{named(pid)} {mib} MiB" for pid, mib in others) or "not listed here"
            yield warning(
                "gpu",
                f"GPU {gpu.index}: {max(held, unknown)} MiB held by others: {who}",
                "end them, or lower --mem-fraction-static",
            )


def smallest_mib(subject: Subject) -> int | None:
    """Memory of the smallest GPU that the node takes; None without one, and when the driver doesn't answer."""
    if subject.on_cpu or subject.config is None:
        return None
    try:
        found = facts(subject)
    except (OSError, msgspec.MsgspecError):
        return None  # `check` says so
    seen = visible(found.gpus, subject.environ.get("CUDA_VISIBLE_DEVICES"))
    sizes_mib = [seen[i].total_mib for i in ordinals(subject) if i < len(seen) and seen[i].total_mib]
    return min(sizes_mib, default=None)

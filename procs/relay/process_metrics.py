"""What each process of the node uses, ``sgnode_process_*``: from /proc, by the names of `sgnode status`."""

import time
from collections.abc import Mapping

import psutil
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

CHILDREN_SECONDS = 30.0
"""How long the engine's list of children is good for: finding them reads all of /proc."""
TITLES = ("sglang::", "sgl_diffusion::", "sgnode::")
"""What the engine's children call themselves; others of it have no metrics."""


class Processes:
    """``families`` may block: /proc of a process in state D does."""

    def __init__(self) -> None:
        self._known: dict[int, psutil.Process] = {}
        self._children: dict[int, str] = {}
        self._engine = 0
        self._look_at = 0.0

    def families(self, pids: Mapping[str, int]) -> list[Metric]:
        """``pids`` by the process's name; the engine's children are found, and called by their titles."""
        memory = GaugeMetricFamily("sgnode_process_resident_memory_bytes", "Resident memory", labels=["process"])
        cpu = CounterMetricFamily("sgnode_process_cpu_seconds_total", "User and system CPU time", labels=["process"])
        fds = GaugeMetricFamily("sgnode_process_open_fds", "Open file descriptors", labels=["process"])
        start = GaugeMetricFamily("sgnode_process_start_time_seconds", "Start, in UNIX seconds", labels=["process"])
        named = [(name, pid) for name, pid in pids.items() if pid]
        named += [(title, pid) for pid, title in self._children_of(pids.get("engine", 0)).items()]
        sums: dict[str, list[float]] = {}
        for name, pid in named:
            if (found := self._read(pid)) is not None:
                sums[name] = found if name not in sums else [a + b for a, b in zip(sums[name], found, strict=True)]
                sums[name][3] = found[3]
        self._known = {pid: process for pid, process in self._known.items() if pid in {pid for _, pid in named}}
        for name, values in sums.items():
            for family, value in zip((memory, cpu, fds, start), values, strict=True):
                family.add_metric([name], value)
        return [memory, cpu, fds, start]

    def _read(self, pid: int) -> list[float] | None:
        """Bytes, CPU seconds, descriptors, start; None when it is gone, or is another process by now."""
        try:
            process = self._known.get(pid)
            if process is None:
                process = self._known[pid] = psutil.Process(pid)
            elif not process.is_running():
                raise psutil.NoSuchProcess(pid)
            with process.oneshot():
                times = process.cpu_times()
                return [
                    float(process.memory_info().rss),
                    times.user + times.system,
                    float(process.num_fds()),
                    process.create_time(),
                ]
        except psutil.Error:
            self._known.pop(pid, None)
            return None

    def _children_of(self, engine: int) -> dict[int, str]:
        """Titles by pid."""
        now = time.monotonic()
        if engine != self._engine or now >= self._look_at:
            self._engine, self._look_at = engine, now + CHILDREN_SECONDS
            self._children = _titled(engine) if engine else {}
        return self._children


def _titled(pid: int) -> dict[int, str]:
    found = {}
    try:
        for child in psutil.Process(pid).children(recursive=True):
            title = (child.cmdline() or [""])[0].split(" ")[0]
            if title.startswith(TITLES):
                found[child.pid] = title
    except psutil.Error:
        return found
    return found

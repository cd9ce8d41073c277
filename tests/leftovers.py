"""What a node holds on to: files, shared memory, cgroups, and descriptors and memory of its side processes. It must not grow."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import requests

from procs.keeper.life import SHARED_PLACES, SHM_MARK_FILE
from tests.harness import Node
from tests.unit.test_scrape import samples

RSS_GROWTH = 1.15
"""Of a side process: allocators and logs settle, a leak of a kilobyte a restart would be more after a hundred."""
RSS_SLACK = 4e6
FDS_SLACK = 4


@dataclass
class Held:
    """At one moment. ``processes``: descriptors and bytes by name, of those that the restarts don't concern."""

    files: set[str]
    temporary: int
    shared_memory: int
    cgroups: int
    processes: dict[str, tuple[float, float]]

    def figures(self) -> dict[str, float | str]:
        """For a soak's results."""
        fds = sum(fds for fds, _ in self.processes.values())
        rss = {f"{name}_mb": round(rss / 1e6, 1) for name, (_, rss) in self.processes.items()}
        return {
            "files": len(self.files),
            "temporary": self.temporary,
            "shared_memory": self.shared_memory,
            "cgroups": self.cgroups,
            "fds": fds,
            **rss,
        }


def marks(node: Node) -> set[str]:
    """Of the lives whose directories are there: one, while an engine runs."""
    return {path.read_text() for path in (node.runtime_dir / "tmp").glob(f"*/{SHM_MARK_FILE}")}


def marked(wanted: set[str]) -> list[str]:
    """What lies in shared places under these marks."""
    return [path.name for place in SHARED_PLACES for path in place.glob("*sgnode-*") if any(m in path.name for m in wanted)]


def held(node: Node) -> Held:
    """Call it while the node is ready. TMPDIR of the node must be its own."""
    root = node.runtime_dir
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.parts[len(root.parts)] not in ("log", "tmp")}
    here = [path for path in root.rglob("*") if path.parts[len(root.parts)] == "tmp"]
    outside = list(Path(node.environment["TMPDIR"]).rglob("*"))
    group = f"sgnode-{hashlib.sha256(str(root).encode()).hexdigest()[:16]}"
    found = samples(requests.get(f"{node.system_url}/metrics", timeout=5).text)
    values = [found[f"sgnode_process_{name}"] for name in ("open_fds", "resident_memory_bytes")]
    fds, rss = ({labels["process"]: value for labels, value in each} for each in values)
    skip = ("keeper", "engine", "frontend")
    return Held(
        files=files,
        temporary=len(here) + len(outside),
        shared_memory=len(marked(marks(node))),
        cgroups=len(list(Path("/sys/fs/cgroup").rglob(group))),
        processes={name: (fds[name], rss[name]) for name in fds if name not in skip and "::" not in name},
    )


def flat(before: Held, after: Held, rss_slack: float = RSS_SLACK) -> None:
    """Nothing has grown; a process's memory by no more than ``rss_slack`` bytes beside RSS_GROWTH."""
    assert after.files == before.files
    for name in ("temporary", "shared_memory", "cgroups"):
        assert getattr(after, name) <= getattr(before, name), (name, before.figures(), after.figures())
    for name, (fds, rss) in after.processes.items():
        old_fds, old_rss = before.processes[name]
        assert fds <= old_fds + FDS_SLACK, (name, old_fds, fds)
        assert rss <= old_rss * RSS_GROWTH + rss_slack, (name, old_rss, rss)

"""NIXL on this host: where its libraries are, and what its transports need to be told. Imports neither."""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path

DISTRIBUTIONS = ("nixl-cu13", "nixl-cu12")
"""Those with the libraries, in the order in which ``import nixl`` takes them on a host without CUDA (1.5.0)."""
LIBRARY = "libnixl_capi.so"
"""What Dynamo's frontend loads, by name (dlopen)."""
INFINIBAND = Path("/sys/class/infiniband")


def libraries() -> Path | None:
    """The directory with LIBRARY, None when NIXL is not installed."""
    for name in DISTRIBUTIONS:
        try:
            files = importlib.metadata.files(name) or ()
        except importlib.metadata.PackageNotFoundError:
            continue
        found = next((file for file in files if file.name == LIBRARY), None)
        if found is not None and (path := Path(str(found.locate()))).exists():
            return path.parent.resolve()
    return None


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """What a process that uses NIXL needs beside ``given``.

    Without InfiniBand UCX leaves its module for it out: that one's library crashes each process that ends (NIXL 0.10 to 1.5).
    """
    if "UCX_MODULES" in given or (INFINIBAND.is_dir() and any(INFINIBAND.iterdir())):
        return {}
    return {"UCX_MODULES": "^ib"}

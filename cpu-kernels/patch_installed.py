"""Changes two installed files for a host without a GPU: torchvision's operators, SGLang's sender of the KV cache.

`make setup` runs it after the packages; a second run changes nothing. It fails when a file is not as expected.
"""

import importlib.util
from pathlib import Path

SENDER = "srt/disaggregation/mooncake/conn.py"
PINNED = "    supports_host_tensor_indices = True\n"
PLAIN = "    supports_host_tensor_indices = False  # sgnode: page-locked memory needs a GPU\n"


def package(name: str) -> Path:
    """Where a package is installed, without importing it."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"{name} is not installed")
    return Path(found.submodule_search_locations[0])


def empty_torchvision_registrations(torchvision: Path) -> None:
    """The index has only torchvision's CUDA build; this file of it names operators that CPU torch doesn't have."""
    target = torchvision / "_meta_registrations.py"
    if not target.exists():
        raise SystemExit(f"{target}: no such file; another torchvision than the tested one?")
    target.write_text("")


def send_without_page_locked_memory(sglang: Path) -> None:
    """SGLang 0.5.23 copies the indices to send into page-locked memory, which only a GPU driver has; it can do without."""
    target = sglang / SENDER
    text = target.read_text()
    if PLAIN in text:
        return
    if text.count(PINNED) != 1:
        raise SystemExit(f"{target}: expected the line {PINNED.strip()!r} once; another SGLang than the tested one?")
    target.write_text(text.replace(PINNED, PLAIN))


if __name__ == "__main__":
    empty_torchvision_registrations(package("torchvision"))
    send_without_page_locked_memory(package("sglang"))

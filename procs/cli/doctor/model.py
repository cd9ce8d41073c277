"""The model's files: all there, and each as long as its own header says. Nothing is downloaded."""

import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from procs.cli import serve
from procs.cli.doctor import pipeline
from procs.cli.doctor.finding import Finding, error, ok, warning
from procs.cli.doctor.subject import Subject

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "tokenizer_config.json")
"""One of these; also *.tiktoken."""
LFS = b"version https://git-lfs"
HEADER_LIMIT = 100 << 20
"""safetensors' own limit of its header."""


@dataclass
class Weights:
    """What a directory has of safetensors. ``wrong``: file -> what is wrong with it."""

    bytes: int = 0
    files: int = 0
    wrong: dict[str, str] = field(default_factory=dict)


def safetensors_trouble(path: Path) -> str:
    """Why a file can't be what it should be; empty when its length is what its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(24)
        if head.startswith(LFS):
            return "a Git LFS pointer, not the weights"
        if len(head) < 8:
            return f"cut off: {size} bytes"
        (length,) = struct.unpack("<Q", head[:8])
        if length > min(size - 8, HEADER_LIMIT):
            return f"cut off, or not safetensors: {size} bytes"
        file.seek(8)
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "its header can't be read"
    expected = 8 + length + max(ends, default=0)
    return "" if size == expected else f"{size} bytes, its header says {expected}"


def weights(directory: Path) -> Weights:
    """Every shard that the index names, or every *.safetensors without one."""
    found = Weights()
    names: set[str] = {path.name for path in directory.glob("*.safetensors")}
    for index in directory.glob("*.safetensors.index.json"):
        try:
            names |= set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as failure:
            found.wrong[index.name] = f"can't be read: {failure}"
    for name in sorted(names):
        path = directory / name
        found.files += 1
        try:
            size = path.stat().st_size
            trouble = safetensors_trouble(path)
        except OSError as failure:
            found.wrong[name] = "missing" if isinstance(failure, FileNotFoundError) else str(failure.strerror)
            continue
        found.bytes += size
        if trouble:
            found.wrong[name] = trouble
    return found


def cached(name: str, revision: str | None, environ: Mapping[str, str]) -> tuple[Path, Path | None]:
    """The hub's cache, and the model's snapshot in it, if it is there (huggingface_hub's layout)."""
    home = environ.get("HF_HOME") or f"{environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')}/huggingface"
    cache = Path(environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub")
    repository = cache / f"models--{name.replace('/', '--')}"
    reference = repository / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision or ""
    snapshot = repository / "snapshots" / commit
    return cache, snapshot if commit and snapshot.is_dir() else None


def place(subject: Subject) -> Path | None:
    """Where the model's files are on this machine; None when they are not."""
    assert subject.config is not None
    if subject.model.is_dir():
        return subject.model
    if serve.is_path(subject.config.model_path):
        return None
    return cached(subject.config.model_path, subject.flag("--revision"), subject.environ)[1]


def check(subject: Subject) -> Iterator[Finding]:
    config = subject.config
    if config is None:
        return
    name = config.model_path
    if "://" in name:
        yield ok("model", f"{name}: fetched by the engine, not looked at")
        return
    if subject.model.is_file():
        yield ok("model", f"{name}: one file, {subject.model.stat().st_size / 1e9:.1f} GB, not looked into")
        return
    directory = place(subject)
    if directory is not None and config.role in ("image", "video"):
        yield from pipeline.complete(directory)
    elif directory is not None:
        dummy = subject.flag("--load-format") == "dummy" or subject.synthetic
        yield from complete(directory, needs_weights=not dummy, needs_tokenizer=not subject.has("--skip-tokenizer-init"))
    elif serve.is_path(name):
        yield error("model", f"{name}: no such directory", "the path of a model directory, or a hub's OWNER/NAME")
    elif subject.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield error("model", f"{name} is not in the cache, and HF_HUB_OFFLINE is set", f"`hf download {name}`, or a directory")
    else:
        cache = cached(name, None, subject.environ)[0]
        there = next(each for each in (cache, *cache.parents) if each.exists())
        free = shutil.disk_usage(there).free / 1e9
        words = f"{name} is not in the cache: the engine downloads it while it loads, to {cache}, {free:.0f} GB free"
        yield warning("model", words, f"`hf download {name}` before")


def complete(directory: Path, *, needs_weights: bool, needs_tokenizer: bool) -> Iterator[Finding]:
    """The files of a model directory."""
    again = "copy or download it again"
    config = directory / "config.json"
    try:
        if not isinstance(json.loads(config.read_text()), dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        yield error("model", f"{config} is missing", "the path of a model directory, as transformers saves it")
    except (OSError, ValueError) as failure:
        yield error("model", f"{config}: {failure}", again)
    if needs_tokenizer and not any((directory / name).exists() for name in TOKENIZERS) and not any(directory.glob("*.tiktoken")):
        yield error("model", f"no tokenizer in {directory}", f"{again}, or --tokenizer-path")
    found = weights(directory)
    for name, trouble in list(found.wrong.items())[:5]:
        yield error("model", f"{directory / name}: {trouble}", again)
    if len(found.wrong) > 5:
        yield error("model", f"{len(found.wrong) - 5} more files of {directory} are wrong", again)
    if found.files and not found.wrong:
        yield ok("model", f"{directory}: {found.files} safetensors files, {found.bytes / 1e9:.1f} GB, complete")
    elif not found.files and not needs_weights:
        yield ok("model", f"{directory}: no weights, and none are needed")
    elif not found.files:
        others = [path.name for pattern in ("*.bin", "*.pt", "*.gguf") for path in directory.glob(pattern)]
        if others:
            yield ok("model", f"{directory}: {others[0]} and {len(others) - 1} more, not looked into")
        else:
            yield error("model", f"no weights in {directory}", f"{again}, or --load-format dummy")

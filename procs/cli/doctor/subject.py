"""What is looked at: a node that is to be started, one that runs, or only this host."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from procs.cli import serve
from shared.config import DISCOVERY_DIR, RUNTIME_DIR_VARIABLE, NodeConfig


@dataclass(frozen=True)
class Subject:
    """``config`` and ``directory`` are None where there is only a host to look at."""

    environ: Mapping[str, str]
    """What SGLang and Dynamo get, or have."""
    directory: Path | None = None
    config: NodeConfig | None = None
    document: Mapping[str, Any] = field(default_factory=dict)
    """The status of a node that runs."""
    supervisord: int = 0
    """Its pid; 0 when no node runs."""

    @property
    def running(self) -> bool:
        return self.supervisord > 0

    @property
    def synthetic(self) -> bool:
        return self.config is not None and self.config.synthetic is not None

    def flag(self, *names: str) -> str | None:
        """The value that one of SGLang's or Dynamo's flags has in the end; None when it was not given."""
        return serve.value_of(self.config.worker_argv if self.config else [], *names)

    def number(self, name: str, default: int) -> int:
        value = self.flag(name) or ""
        return int(value) if value.lstrip("-").isdigit() else default

    def has(self, flag: str) -> bool:
        return any(argument.partition("=")[0] == flag for argument in (self.config.worker_argv if self.config else []))

    @property
    def model(self) -> Path:
        """The model's directory, if it is one: a relative path is one of where the node was started."""
        assert self.config is not None
        at = Path()
        if self.running:
            with contextlib.suppress(psutil.Error):
                at = Path(psutil.Process(self.supervisord).cwd())
        return at / self.config.model_path

    @property
    def on_cpu(self) -> bool:
        """The engine asks for no GPU."""
        return self.synthetic or self.flag("--device") == "cpu" or not serve.has_gpu()

    @property
    def store(self) -> Path | None:
        """Directory of Dynamo's file store, with that backend."""
        if self.config is None or self.directory is None or self.config.dynamo.discovery_backend != "file":
            return None
        return Path(self.environ.get("DYN_FILE_KV") or self.directory / DISCOVERY_DIR)

    def owns(self, pid: int) -> bool:
        """The process belongs to the node: supervisord, or one with the node's mark in its environment."""
        if not self.running:
            return False
        if pid == self.supervisord:
            return True
        try:
            return psutil.Process(pid).environ().get(RUNTIME_DIR_VARIABLE) == str(self.directory)
        except psutil.Error:
            return False


def named(pid: int) -> str:
    """``pid 4242 (python -m http.server)``, for a person."""
    try:
        words = psutil.Process(pid).cmdline() or [psutil.Process(pid).name()]
    except psutil.Error:
        return f"pid {pid}"
    return f"pid {pid} ({cut(' '.join(' '.join([words[0].rpartition('/')[2], *words[1:]]).split()), 60)})"


def cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"

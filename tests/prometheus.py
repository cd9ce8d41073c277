"""A real Prometheus on loopback (Debian's prometheus) with the repository's alerts, over the targets of a test."""

import json
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from monitoring import ALERTS
from tests.frontend import free_port
from tests.harness import wait_for


class Prometheus:
    """``targets``: addresses (HOST:PORT) by job."""

    def __init__(self, root: Path, targets: Mapping[str, list[str]], interval: str = "1s") -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._root = root
        every = {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval}
        jobs = [{"job_name": job, "static_configs": [{"targets": addresses}]} for job, addresses in targets.items()]
        config = {"global": every, "rule_files": [str(ALERTS)], "scrape_configs": jobs}
        (root / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Prometheus":
        command = ["prometheus", f"--config.file={self._root}/prometheus.yml", f"--storage.tsdb.path={self._root}/prometheus"]
        with (self._root / "prometheus.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, f"--web.listen-address=127.0.0.1:{self.port}"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        wait_for("Prometheus", self._ready, 20)
        return self

    def __exit__(self, *_exc: object) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def query(self, expr: str) -> list[dict[str, Any]]:
        """Series of an instant query. Raises OSError (HTTPError) for a query that it doesn't take."""
        asked = urllib.parse.urlencode({"query": expr})
        with urllib.request.urlopen(f"{self.url}/api/v1/query?{asked}", timeout=5) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return found

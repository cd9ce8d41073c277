"""Fixtures that several kinds of test share."""

import subprocess
from pathlib import Path

import pytest

from tests.harness import SGNODE


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights, made by the command that users have."""
    path = tmp_path_factory.mktemp("models") / "demo-llama"
    subprocess.run([SGNODE, "demo-model", str(path)], check=True, capture_output=True, timeout=120)
    return path

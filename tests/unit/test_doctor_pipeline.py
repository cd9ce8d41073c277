"""What `sgnode doctor` says of an image or a video worker's model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from procs.cli.doctor import pipeline
from procs.cli.doctor.finding import Finding


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name in ("transformer", "vae", "scheduler"):
        (tmp_path / name).mkdir()
    for name in ("transformer", "vae"):
        save_file({"weight": torch.zeros(4)}, tmp_path / name / "diffusion_pytorch_model.safetensors")
    parts = {name: ["diffusers", "Class"] for name in ("transformer", "vae", "scheduler")}
    index = {"_class_name": "ZImagePipeline", "_diffusers_version": "0.37.0", "safety_checker": [None, None], **parts}
    (tmp_path / pipeline.INDEX).write_text(json.dumps(index))
    return tmp_path


def found(directory: Path) -> list[tuple[str, str]]:
    def plain(finding: Finding) -> tuple[str, str]:
        return finding.level, finding.found

    return [plain(finding) for finding in pipeline.complete(directory)]


def test_a_whole_pipeline(directory: Path) -> None:
    ((level, words),) = found(directory)
    assert level == "ok" and "ZImagePipeline, 2 safetensors files" in words


def test_what_is_missing_or_cut_off_is_named(directory: Path) -> None:
    (directory / "scheduler").rmdir()
    path = directory / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert [level for level, _ in found(directory)] == ["error", "error"]
    words = " ".join(words for _, words in found(directory))
    assert "scheduler is missing" in words and str(path) in words


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_an_index_that_is_none(directory: Path, content: str | None) -> None:
    index = directory / pipeline.INDEX
    index.unlink()
    if content is not None:
        index.write_text(content)
    ((level, words),) = found(directory)
    assert level == "error" and pipeline.INDEX in words


def test_a_pipeline_without_weights(directory: Path) -> None:
    for path in directory.rglob("*.safetensors"):
        path.unlink()
    assert [level for level, _ in found(directory)] == ["error"]

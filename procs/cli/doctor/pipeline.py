"""A diffusers pipeline's files: each part that its index names is there, and its weights are as long as their headers say."""

import json
from collections.abc import Iterator
from pathlib import Path

from procs.cli.doctor.finding import Finding, error, ok

INDEX = "model_index.json"
AGAIN = "copy or download it again"


def complete(directory: Path) -> Iterator[Finding]:
    """The files of an image or a video worker's model."""
    from procs.cli.doctor.model import weights

    index = directory / INDEX
    try:
        named = json.loads(index.read_text())
        if not isinstance(named, dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        yield error("model", f"{index} is missing", "the path of a pipeline's directory, as diffusers saves it")
        return
    except (OSError, ValueError) as failure:
        yield error("model", f"{index}: {failure}", AGAIN)
        return
    # [library, class]; both None where the pipeline goes without it.
    parts = sorted(name for name, value in named.items() if isinstance(value, list) and any(value))
    wrong = [f"{directory / name} is missing" for name in parts if not (directory / name).is_dir()]
    files, size = 0, 0
    for name in parts:
        found = weights(directory / name)
        files, size = files + found.files, size + found.bytes
        wrong += [f"{directory / name / file}: {trouble}" for file, trouble in found.wrong.items()]
    for words in wrong[:5]:
        yield error("model", words, AGAIN)
    if len(wrong) > 5:
        yield error("model", f"{len(wrong) - 5} more files of {directory} are wrong", AGAIN)
    if files and not wrong:
        yield ok("model", f"{directory}: {named.get('_class_name')}, {files} safetensors files, {size / 1e9:.1f} GB, complete")
    elif not files:
        yield error("model", f"no weights in {directory}", AGAIN)

"""The collector rests while modules are imported, and works again when a spawned process does."""

import subprocess
import sys
from pathlib import Path

SPAWNED = (
    "import gc\nimported = gc.isenabled()\ndef target():\n    print(imported, gc.isenabled(), gc.get_freeze_count() > 1000)\n"
)
MAIN = """\
import gc, multiprocessing, sys
from procs.engine import imports

if __name__ == "__main__":
    imports.hold_collector()
    import spawned
    print(spawned.imported, flush=True)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=spawned.target)
    process.start()
    process.join()
    imports.resume_collector()
    print(gc.isenabled(), flush=True)
"""


def test_no_collection_in_an_import_of_a_spawned_process(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (tmp_path / "spawned.py").write_text(SPAWNED)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(MAIN)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "package"]
    environment = {"PYTHONPATH": f"{tmp_path}:{root}"}
    said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert said.stdout.split() == ["False", "False", "True", "True", "True"]

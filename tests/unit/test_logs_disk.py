"""Small files of the runtime directory on a file system that is really full: a tmpfs of some pages."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from procs.keeper import life
from shared import files, registrations
from shared.registrations import Registration
from tests.disks import fill, tmpfs

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with tmpfs(tmp_path, "256k"):
        yield tmp_path


def test_a_file_is_replaced_or_written_in_its_place(disk: Path) -> None:
    path = disk / "epoch"
    files.rewrite(path, b"one, and some more")
    inode = path.stat().st_ino
    files.rewrite(path, b"two, and some more")
    assert path.read_bytes() == b"two, and some more" and path.stat().st_ino != inode and path.stat().st_mode & 0o777 == 0o600
    inode = path.stat().st_ino
    fill(disk)
    files.rewrite(path, b"short")
    assert path.read_bytes() == b"short" and path.stat().st_ino == inode
    files.rewrite(path, b"longer than before" * 9)
    assert path.read_bytes() == b"longer than before" * 9
    assert sorted(entry.name for entry in disk.iterdir()) == ["epoch", "filler"]


def test_without_any_room_the_error_names_the_file_and_what_to_do(disk: Path) -> None:
    fill(disk)
    with pytest.raises(OSError, match=f"No space left on device: {disk}/new can't be written; make room there"):
        files.rewrite(disk / "new", b"x")
    assert not (disk / "new.tmp").exists()


def test_an_engine_s_next_life_needs_no_room(disk: Path) -> None:
    assert life.begin(disk).incarnation == 1
    fill(disk)
    second = life.begin(disk)
    assert second.incarnation == 2 and second.metrics.is_dir()
    assert life.begin(disk).incarnation == 3


def test_a_registration_that_can_t_be_written_leaves_nothing(disk: Path) -> None:
    (disk / "registrations").mkdir()
    fill(disk)
    with pytest.raises(OSError, match="No space"):
        registrations.hold(disk, Registration("agent:0", 7, "file"))
    assert list((disk / "registrations").iterdir()) == []


def test_the_tmpfs_is_gone_after_a_test(tmp_path: Path) -> None:
    with tmpfs(tmp_path, "64k"):
        fill(tmp_path)
    assert list(tmp_path.iterdir()) == [] and str(tmp_path) not in subprocess.check_output(["mount"], text=True)

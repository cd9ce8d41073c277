"""Where generated files go: --media-output-fs-url, by Dynamo's own storage, from threads of its own."""

import asyncio
import contextlib
import errno
import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

SECONDS = 60.0
"""For one file. A store that takes longer counts as failed."""
THREADS = 4
"""So many files at once; a store that hangs holds these and nothing else."""


class StoreError(Exception):
    """A file could not be stored: one line for the client, without a place of this host."""


class OutputStore:
    """``fs_url``: any of fsspec's (file://, s3://, ...). ``http_url``: what clients reach it by; None: fs_url itself."""

    def __init__(self, fs_url: str, http_url: str | None) -> None:
        self._url = fs_url
        self._http_url = http_url
        self._fs: Any = None
        self._threads = ThreadPoolExecutor(THREADS, "store")
        self._closed = False

    async def put(self, path: str, content: bytes) -> str:
        """Store a file under ``path``, relative and safe; its URL. Raises StoreError."""
        from dynamo.common.storage import get_media_url

        if self._closed:
            raise StoreError("the file could not be stored: the node is stopping")
        writing = self._threads.submit(self._write, path, content)
        try:
            async with asyncio.timeout(SECONDS):
                await asyncio.wrap_future(writing)  # cancelled with it, unless a thread has begun
        except asyncio.CancelledError:
            writing.add_done_callback(partial(self._late, path))
            raise
        except TimeoutError:
            writing.add_done_callback(partial(self._late, path))
            why = f"no end within {SECONDS:.0f} s"
        except OSError as error:
            why = error.strerror or type(error).__name__
        except Exception as error:  # a store's own ways to fail are many: botocore's, ImportError, ...
            why = type(error).__name__
        else:
            return str(get_media_url(self._fs, path, self._http_url))
        logging.error("%s under %s: %s", path, self._url, why)
        raise StoreError(f"the file could not be stored: {why}")

    def _late(self, path: str, writing: Future[None]) -> None:
        """A thread can't be stopped: what it has stored for nobody is removed, without the event loop, which may be gone."""
        if not writing.cancelled() and writing.exception() is None:
            self.discard([path])

    def discard(self, paths: list[str]) -> None:
        """Files that nobody gets to know of are removed, in their own time."""
        if not paths or self._fs is None:
            return
        try:
            self._threads.submit(self._remove, paths)
        except RuntimeError:  # closed: they take no more work
            threading.Thread(target=self._remove, args=(paths,), name="store").start()

    def _write(self, path: str, content: bytes) -> None:
        from dynamo.common.storage import get_fs

        if self._closed:
            raise OSError(errno.ESHUTDOWN, "the node is stopping")
        if self._fs is None:
            self._fs = get_fs(self._url)
        root = self._root()
        try:
            if root is not None:
                _make((root / path).parent)
            self._fs.pipe(path, content)
            if root is not None:
                (root / path).chmod(0o644)
        except BaseException:
            self._remove([path])
            raise

    def _root(self) -> Path | None:
        """The store's folder on this host; None: it is elsewhere."""
        return Path(str(self._fs.path)) if "file" in self._fs.fs.protocol else None

    def _remove(self, paths: list[str]) -> None:
        root = self._root()
        for path in paths:
            with contextlib.suppress(Exception):
                self._fs.rm_file(path)
            if root is not None:
                with contextlib.suppress(OSError):  # not empty: another's
                    for folder in Path(path).parents[:-1]:
                        (root / folder).rmdir()

    def close(self) -> None:
        """What waits to be written fails, what waits to be removed is removed."""
        self._closed = True
        self._threads.shutdown(wait=False)


def _make(folder: Path) -> None:
    """It and what is missing above it, for everybody to read as this process makes files for itself alone. Raises OSError."""
    while not folder.is_dir():
        try:
            folder.mkdir()
            folder.chmod(folder.stat().st_mode | 0o555)  # only what is made here: others are as their owner wants them
        except FileExistsError:
            if not folder.is_dir():
                raise
        except FileNotFoundError:  # also where another agent has just removed an empty one
            _make(folder.parent)

"""Where generated files go: --media-output-fs-url, by Dynamo's own storage, from threads of its own."""

import asyncio
import contextlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
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

    async def put(self, path: str, content: bytes) -> str:
        """Store a file under ``path``, relative and safe; its URL. Raises StoreError."""
        from dynamo.common.storage import get_media_url

        writing = asyncio.get_running_loop().run_in_executor(self._threads, self._write, path, content)
        try:
            async with asyncio.timeout(SECONDS):
                await asyncio.shield(writing)
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

    def _late(self, path: str, writing: "asyncio.Future[None]") -> None:
        """A thread can't be stopped: what it has stored for nobody is removed."""
        if not writing.cancelled() and writing.exception() is None:
            self.discard([path])

    def discard(self, paths: list[str]) -> None:
        """Files that nobody gets to know of are removed, in their own time."""
        if paths and self._fs is not None:
            self._threads.submit(self._remove, paths)

    def _write(self, path: str, content: bytes) -> None:
        from dynamo.common.storage import get_fs

        if self._fs is None:
            self._fs = get_fs(self._url)
        try:
            self._fs.pipe(path, content)
            self._open(path)
        except BaseException:
            self._remove([path])
            raise

    def _open(self, path: str) -> None:
        """This process makes files for itself alone; whoever serves these has to read them."""
        root = Path(str(self._fs.path))
        if "file" not in self._fs.fs.protocol:
            return
        os.chmod(root / path, 0o644)
        for folder in [*(root / path).parents]:
            if folder == root.parent:
                break
            with contextlib.suppress(PermissionError):  # another user's, who has made it as they want it
                os.chmod(folder, folder.stat().st_mode | 0o555)

    def _remove(self, paths: list[str]) -> None:
        for path in paths:
            with contextlib.suppress(Exception):
                self._fs.rm_file(path)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

"""Controls that would end SGLang's scheduler are refused before it hears of them (0.5.23; each was tried on the incumbent)."""

from typing import Any

RELEASE, RESUME, PAUSE = "release_memory_occupation", "resume_memory_occupation", "pause_generation"
MODES = ("abort", "in_place", "retract")
NUMBERS = ("start_step", "num_steps")


def check_body(path: str, body: Any) -> None:
    """Raises ValueError for a value that SGLang's scheduler would die of."""
    if not isinstance(body, dict):
        return
    if path == PAUSE and body.get("mode", "abort") not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {body['mode']!r}")
    if path == "control/start_profile":
        for name in NUMBERS:
            value = body.get(name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"{name}: expected a number of steps, got {value!r}")
    if path == "control/update_weights_from_disk" and body.get("load_format") is not None:
        from sglang.srt.configs.load_config import LoadFormat

        known = [str(item.value) for item in LoadFormat]
        if body["load_format"] not in known:
            raise ValueError(f"load_format: expected one of {', '.join(known)}, got {body['load_format']!r}")


class Memory:
    """Which kinds of accelerator memory are released. While any is, no request may reach the engine."""

    def __init__(self) -> None:
        self.released: set[str] = set()
        self._added: set[str] = set()

    def begin(self, path: str, body: Any, *, running: int) -> dict[str, Any] | None:
        """The answer when there is nothing to do, else None; a release counts from here on. Raises ValueError.

        ``running``: requests in a running batch.
        """
        tags = self._tags(body)
        if path == RESUME:
            if not self.released:
                return {"status": "ok"}
            if not tags <= self.released:
                raise ValueError(f"tags {sorted(tags - self.released)}: not released; released are {sorted(self.released)}")
            return None
        if tags <= self.released:
            return {"status": "ok"}
        if tags & self.released:
            raise ValueError(f"tags {sorted(tags & self.released)}: released already")
        if running:
            raise ValueError(f"{running} requests are running; drain first, or use `sgnode sleep`")
        self._added = tags
        self.released |= tags
        return None

    def done(self, path: str, body: Any) -> None:
        """It has worked."""
        if path == RESUME:
            self.released -= self._tags(body)
        self._added = set()

    def undo(self) -> None:
        """A release has failed."""
        self.released -= self._added
        self._added = set()

    @staticmethod
    def _tags(body: Any) -> set[str]:
        from sglang.srt.constants import GPU_MEMORY_ALL_TYPES

        found = body.get("tags") if isinstance(body, dict) else None
        if found is not None and (not isinstance(found, list) or not set(map(str, found)) <= set(GPU_MEMORY_ALL_TYPES)):
            raise ValueError(f"tags: expected a list of {', '.join(GPU_MEMORY_ALL_TYPES)}, got {found!r}")
        return set(found or GPU_MEMORY_ALL_TYPES)

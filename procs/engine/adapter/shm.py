"""Names by which the keeper finds what a killed engine left in shared memory: SGLang unlinks nothing then (0.5.23)."""

import multiprocessing
import os
import uuid
from typing import Any

VARIABLE = "SGNODE_SHM_MARK"


def mark() -> None:
    """Before SGLang starts anything: its load snapshot (32 KiB and more a life) and Python's semaphores carry the keeper's mark.

    Without it, or with an SGLang that names its snapshot in another way, names stay as they are.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return
    # CPython 3.11, multiprocessing/synchronize.py: every child inherits it.
    config: dict[str, Any] = getattr(multiprocessing.current_process(), "_config", {})
    config["semprefix"] = f"/{name}"
    from sglang.srt.server_args import PortArgs

    if "instance_id" not in getattr(PortArgs, "__dataclass_fields__", {}):
        return
    made = PortArgs.init_new

    def init_new(*args: Any, **kwargs: Any) -> Any:
        ports = made(*args, **kwargs)
        ports.instance_id = f"{name}-{uuid.uuid4().hex[:12]}"
        return ports

    PortArgs.init_new = staticmethod(init_new)

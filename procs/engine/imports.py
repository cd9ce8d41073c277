"""The garbage collector while SGLang is imported, in the engine's process and in those that SGLang spawns.

An import makes millions of objects and no garbage; looking for it among them is a quarter of the time (6.1 s, without it 4.4 s).
"""

import gc
import sys
from multiprocessing import context


def hold_collector() -> None:
    """No collection until ``resume_collector``; in each process that multiprocessing spawns, until its target is called."""
    gc.disable()
    # A spawned process imports its parent's main module first, but never a ``__main__.py``: now it is this one.
    sys.modules["__main__"].__spec__ = __spec__


def resume_collector() -> None:
    """What is there now stays: later collections leave it out."""
    gc.freeze()
    gc.enable()


if __name__ == "__mp_main__":
    gc.disable()
    # Called between what the target's module imports and the target; as they are, they do nothing.
    for kind in (context.SpawnProcess, context.ForkServerProcess):
        setattr(kind, "_after_fork", staticmethod(resume_collector))  # noqa: B010 (typeshed doesn't know it)

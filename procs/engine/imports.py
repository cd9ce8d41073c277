"""The garbage collector while SGLang is imported, in the engine's process and in those that SGLang spawns.

An import makes millions of objects and no garbage; looking for it among them is a quarter of the time (6.1 s, without it 4.4 s).
"""

import gc
from multiprocessing import util


def hold_collector() -> None:
    """No collection until ``resume_collector``; in a process that multiprocessing spawns, until its target is called.

    For the top of a program's main module: a spawned process imports that one first, then what its target needs.
    """
    gc.disable()
    # In a spawned process too these are called between the last import and the target.
    util.register_after_fork(resume_collector, lambda resume: resume())


def resume_collector() -> None:
    """What is there now stays: later collections leave it out."""
    gc.freeze()
    gc.enable()

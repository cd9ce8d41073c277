"""The one place that knows SGLang's internals. It probes for what it uses and never compares versions.

Tested with SGLang 0.5.23 on CPU; written against 0.5.16 too. Sources are named where a private attribute is used.
"""

from procs.engine.adapter.backend import SglangBackend

__all__ = ["SglangBackend"]

"""SGLang's DiffGenerator behind the backend seam: image and video workers."""

from procs.engine.adapter.diffusion.backend import DiffusionBackend

__all__ = ["DiffusionBackend"]

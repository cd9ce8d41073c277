"""Parent of the engine: says its death at once, frees everything before it exits. Never imports sglang or torch."""

"""Side-by-side measurements. Every figure is a ratio against a peer measured in the same run."""

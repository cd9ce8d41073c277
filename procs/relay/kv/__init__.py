"""KV events: taken from SGLang frame by frame, mirrored by DP rank, published under every agent's worker id."""

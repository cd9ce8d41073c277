"""Order: starts and restarts the engine, says what the node is and what it wants. Never on the path of a token."""

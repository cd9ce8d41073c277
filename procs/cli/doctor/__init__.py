"""`sgnode doctor`: what would go wrong with a start, or is wrong with a running node. Starts nothing, leaves nothing behind."""

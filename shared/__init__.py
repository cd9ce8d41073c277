"""What two or more of the node's processes use. Nothing here imports from ``procs``, sglang, torch or dynamo."""

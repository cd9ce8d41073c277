"""``sgl.Engine`` alone, until it is there: ``python -m benchmarks.bare_start [--hold] -- FLAGS OF python -m dynamo.sglang``.

Says ``READY`` with UNIX seconds. ``--hold``: without garbage collection while modules are imported, as the node's engine.
"""

import asyncio
import sys
import time

from procs.engine import imports


def main() -> None:
    hold, flags = sys.argv[1:].index("--") > 0, sys.argv[sys.argv.index("--") + 1 :]
    if hold:
        imports.hold_collector()
    import sglang as sgl
    from dynamo.sglang.args import parse_args

    from shared import logs

    parsed = asyncio.run(parse_args(flags))
    asyncio.set_event_loop(asyncio.new_event_loop())
    logs.facts["process"] = "engine"
    logs.take_back()
    engine = sgl.Engine(server_args=parsed.server_args)
    print(f"READY {time.time()}", flush=True)
    engine.shutdown()


if __name__ == "__main__":
    main()

"""Greedy tokens of ``sgl.Engine`` called directly: the truth that a node is compared with. Prints one JSON line.

usage: python -m tests.e2e.reference PROMPTS_JSON NEW_TOKENS -- FLAGS OF python -m dynamo.sglang
"""

import asyncio
import json
import sys


def main() -> None:
    import sglang as sgl
    from dynamo.sglang.args import parse_args

    prompts = json.loads(sys.argv[1])
    params = {"temperature": 0, "max_new_tokens": int(sys.argv[2]), "ignore_eos": True}
    parsed = asyncio.run(parse_args(sys.argv[4:]))
    asyncio.set_event_loop(asyncio.new_event_loop())
    engine = sgl.Engine(server_args=parsed.server_args)
    answers = [engine.generate(input_ids=ids, sampling_params=params)["output_ids"] for ids in prompts]
    print("REFERENCE " + json.dumps(answers), flush=True)
    engine.shutdown()


if __name__ == "__main__":
    main()

"""A process that holds ``sgl.Engine`` and answers about images when told to: benchmarks.image_chat's side ``engine``.

usage: python -m benchmarks.image_engine FD -- FLAGS OF python -m dynamo.sglang
FD is an inherited multiprocessing connection. On it comes "up"; then each ``(image, words, tokens)`` gets the seconds to the
first token, from the call with the image's bytes, and the ids.
"""

import asyncio
import sys
import time
from multiprocessing.connection import Connection


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    from dynamo.sglang.args import parse_args

    server_args = asyncio.run(parse_args(sys.argv[3:])).server_args
    loop = asyncio.new_event_loop()  # uvloop's: SGLang has set its policy
    asyncio.set_event_loop(loop)
    import sglang as sgl
    from transformers import AutoTokenizer

    engine = sgl.Engine(server_args=server_args)
    tokenizer = AutoTokenizer.from_pretrained(server_args.model_path)

    async def ask(image: bytes, words: str, tokens: int) -> tuple[float, list[int]]:
        content = [{"type": "image"}, {"type": "text", "text": words}]
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        began, first, out = time.monotonic(), 0.0, list[int]()
        stream = await engine.async_generate(input_ids=ids, image_data=[image], sampling_params=params, stream=True)
        async for chunk in stream:
            first = first or time.monotonic() - began
            out += chunk["output_ids"]
        return first, out

    connection.send("up")
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        while True:
            try:
                told = connection.recv()
            except EOFError:
                return
            connection.send(runner.run(ask(*told)))


if __name__ == "__main__":
    main()

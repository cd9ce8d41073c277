"""An ``sgl.Engine`` called directly, in a process of its own: what a node's answers are compared with.

``python -m tests.e2e.direct FLAGS OF python -m dynamo.sglang``: [name, arguments] pairs as JSON in, one line of answers out.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from procs.cli.serve import CPU_DEFAULTS, engine_environment
from tests import marked
from tests.harness import ONE_THREAD

Call = tuple[str, dict[str, Any]]
"""One of ``_call``'s names with its arguments."""


def direct(model: Path, flags: list[str], calls: list[Call], temporary: Path, seconds: float = 240.0) -> list[Any]:
    """The answers of an engine that is started for these calls and ended afterwards."""
    defaults = [part for flag, values in CPU_DEFAULTS.items() for part in (flag, *values)]
    arguments = ["--model-path", str(model), *defaults, *flags]
    environ = {**engine_environment(), **ONE_THREAD, "TMPDIR": str(temporary), "HF_HUB_OFFLINE": "1"}
    answers: list[Any] = marked.ask("tests.e2e.direct", arguments, calls, environ, seconds)
    return answers


def _call(engine: Any, name: str, arguments: dict[str, Any]) -> Any:
    match name:
        case "embed":
            # Engine.encode takes texts only.
            from sglang.srt.managers.io_struct import EmbeddingReqInput

            answer = engine.loop.run_until_complete(
                anext(engine.tokenizer_manager.generate_request(EmbeddingReqInput(**arguments), None))
            )
            return [one["embedding"] for one in (answer if isinstance(answer, list) else [answer])]
        case "rerank":
            return [one["embedding"] for one in engine.rerank(**arguments)]
        case "chat":
            ids = engine.tokenizer_manager.tokenizer.apply_chat_template(
                arguments.pop("messages"), tokenize=True, add_generation_prompt=True, return_dict=False
            )
            answer = engine.generate(input_ids=ids, **arguments)
            return {"text": answer["text"], "prompt": len(ids), "ids": answer["output_ids"]}
        case "generate":
            return engine.generate(**arguments)["output_ids"]
        case "load_lora_adapter":
            return engine.load_lora_adapter(**arguments).success
    raise ValueError(f"unknown call {name!r}")


def main() -> None:
    import sglang as sgl
    from dynamo.sglang.args import parse_args

    calls = json.load(sys.stdin)
    parsed = asyncio.run(parse_args(sys.argv[1:]))
    asyncio.set_event_loop(asyncio.new_event_loop())
    engine = sgl.Engine(server_args=parsed.server_args)
    answers = [_call(engine, name, arguments) for name, arguments in calls]
    marked.answer(answers)
    engine.shutdown()


if __name__ == "__main__":
    main()

"""The worker configurations that the set needs: model, worker flags, the frontend's environment."""

from dataclasses import dataclass, field

MODEL = "demo"
ALIAS = "demo-alias"

CPU = (
    "--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--disable-cuda-graph",
    "--max-total-tokens", "16384", "--max-running-requests", "64", "--mem-fraction-static", "0.2", "--page-size", "16",
    "--skip-server-warmup", "--sleep-on-idle",
    "--constrained-json-disable-any-whitespace",
)  # fmt: skip
"""`sgnode serve`'s own defaults for a host without a GPU; dynamo.sglang needs them spelt out.

The last one, because random weights love white space.
"""

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] | upper }}] {{ m['content'] }}\n{% endfor %}"
    "{% if tools %}[TOOLS] {{ tools | length }}\n{% endif %}"
    "{% if shout is defined %}[SHOUT {{ shout }}]\n{% endif %}"
    "{% if add_generation_prompt %}[ASSISTANT] {% endif %}"
)
"""For --custom-jinja-template: unlike the model's own, and it takes an argument of the request (``shout``)."""


@dataclass(frozen=True)
class Configuration:
    """How both workers are started. ``{template}`` in a flag is the path of a file with TEMPLATE."""

    name: str
    what: str
    flags: tuple[str, ...] = ()
    arch: str = "llama"
    served: str = MODEL
    frontend: dict[str, str] = field(default_factory=dict)

    def arguments(self, model: str, template: str) -> list[str]:
        """The worker's flags, the same for both."""
        names = ("--model-path", model, "--served-model-name", self.served)
        return [*names, *CPU, *(flag.replace("{template}", template) for flag in self.flags)]


APIS = {"DYN_ENABLE_ANTHROPIC_API": "1", "DYN_SGLANG_ENABLE_GENERATE": "1"}
"""Of the frontend: routes that are off by default."""

CONFIGURATIONS = {
    made.name: made
    for made in (
        Configuration("main", "text in, tokens to the worker; two served names", served=f"{MODEL},{ALIAS}", frontend=APIS),
        Configuration(
            "parsers",
            # No --enable-strict-thinking: without a GPU SGLang 0.5.23 dies of the first request then. No --reasoning-parser:
            # a grammar would wait for the end of a thought that random weights never end.
            "tool call and reasoning parsers, a custom chat template",
            flags=(
                *("--dyn-tool-call-parser", "hermes", "--dyn-reasoning-parser", "deepseek_r1"),
                *("--custom-jinja-template", "{template}"),
            ),
            frontend=APIS,
        ),
        Configuration("embedding", "an embedding worker", flags=("--embedding-worker",), arch="qwen3"),
        Configuration("text", "text mode: SGLang tokenises", flags=("--use-sglang-tokenizer",), frontend=APIS),
        Configuration(
            "media",
            "a vision model",
            flags=("--enable-multimodal", "--limit-mm-data-per-request", '{"image": 8}'),
            arch="vision",
            frontend=APIS,
        ),
    )
}

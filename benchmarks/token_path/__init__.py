"""The token path measured: raw ``sgl.Engine``, its ceiling, ``dynamo.sglang`` and sgnode under the same load, in turns.

``python -m benchmarks.token_path --help``; what each figure means is in benchmarks/README.md.
"""

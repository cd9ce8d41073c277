"""Parity: the same recorded requests through a Dynamo frontend to ``dynamo.sglang`` and to sgnode, answers compared.

``python -m tests.parity`` runs everything; ``--list`` names the configurations; docstrings say what each file owns.
"""

"""`sgnode group-key FILE`: the key by which the nodes of a group know each other."""

from pathlib import Path

from procs.cli.flags import Parser
from shared import group_key as key


def main(argv: list[str]) -> int:
    """Make it. Raises NodeError when there is a file already."""
    made = Parser(prog="sgnode group-key", description=__doc__, allow_abbrev=False)
    made.add_argument("file", type=Path, metavar="FILE")
    found = made.parse_args(argv)
    key.make(found.file.absolute())
    print(f"{found.file}: a new key. Copy it to every node, readable by its user only, and pass {key.FLAG} {found.file} there")
    return 0

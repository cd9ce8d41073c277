"""``python -m tests.parity``: run the set against both sides, print how they differ, exit 1 if anything is unexpected.

While working on sgnode: once ``--record FILE``, then ``--against FILE``. PARITY_LOGS=DIR keeps every worker's log.
"""

import argparse
import json
import signal
import sys
import time
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory

import requests

from tests.parity.case import Case
from tests.parity.client import ask, unsent
from tests.parity.compare import Difference, compare
from tests.parity.configurations import CONFIGURATIONS, Configuration
from tests.parity.corpus import CORPUS
from tests.parity.differences import EXPECTED, Expected, reason_of
from tests.parity.recording import Recording
from tests.parity.workers import SIDES, Models, serving

SHOWN_CHARACTERS = 220


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("--list", action="store_true", help="name the configurations and how many requests each has")
    parser.add_argument("--only", action="append", choices=CONFIGURATIONS, help="this configuration (may be repeated)")
    parser.add_argument("--case", default="*", metavar="PATTERN", help="requests whose name matches, as of a shell")
    parser.add_argument("--record", type=Path, metavar="FILE", help="keep the incumbent's answers")
    parser.add_argument("--against", type=Path, metavar="FILE", help="recorded answers instead of the incumbent")
    parser.add_argument("--no-sgnode", action="store_true", help="run the incumbent only (with --record)")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="keep sgnode's answers too")
    parser.add_argument("--expected", action="store_true", help="print the expected differences too")
    return parser.parse_args()


def main() -> int:
    wanted = arguments()
    # Told to end, it ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    chosen = {name: CONFIGURATIONS[name] for name in wanted.only or CONFIGURATIONS}
    sets = {name: [case for case in CORPUS[name] if fnmatchcase(case.name, wanted.case)] for name in chosen}
    if wanted.list:
        for name, made in chosen.items():
            print(f"{name:10} {len(sets[name]):4} requests  {made.what}")
        print(f"{'':10} {sum(map(len, sets.values())):4} in all, {len(EXPECTED)} expected differences")
        return 0
    incumbents = Recording.load(wanted.against) if wanted.against else Recording()
    ours = Recording()
    failed: list[str] = []
    with TemporaryDirectory(prefix="parity-models-") as root:
        models = Models(Path(root), {made.arch for name, made in chosen.items() if sets[name]})
        for side in SIDES:
            if (side == "incumbent" and wanted.against) or (side == "sgnode" and wanted.no_sgnode):
                continue
            for name, made in chosen.items():
                if sets[name]:
                    failed += run(side, made, models, sets[name], incumbents if side == "incumbent" else ours)
    if wanted.record:
        incumbents.save(wanted.record)
    if wanted.keep:
        ours.save(wanted.keep)
    if not wanted.no_sgnode:
        failed += report(sets, incumbents, ours, show_expected=wanted.expected)
    return 1 if failed else 0


def run(side: str, made: Configuration, models: Models, cases: list[Case], into: Recording) -> list[str]:
    """Send the requests in their order. Returns what went wrong: a worker that doesn't start, or one that dies."""
    begun = time.monotonic()
    try:
        with serving(side, made, models) as url, requests.Session() as session:
            ready = time.monotonic()
            for case in cases:
                left_out = case.alone if side == "incumbent" else ""
                into.add(made.name, case, unsent(left_out) if left_out else ask(session, url, case))
            done = time.monotonic()
    except AssertionError as error:
        print(f"{side} {made.name}: did not serve\n{error}", flush=True)
        return [f"{side} {made.name}"]
    print(f"{side} {made.name}: {len(cases)} requests in {done - ready:.1f} s, up after {ready - begun:.1f} s", flush=True)
    return []


def report(sets: dict[str, list[Case]], incumbents: Recording, ours: Recording, *, show_expected: bool) -> list[str]:
    """Print the differences; returns the names of requests that have unexpected ones."""
    compared, unexpected = 0, []
    used: Counter[Expected] = Counter()
    for configuration, cases in sets.items():
        for case in cases:
            one, other = incumbents.answer(configuration, case), ours.answer(configuration, case)
            if one is None or other is None:
                unexpected.append(f"{configuration}/{case.name}")
                print(f"{configuration}/{case.name}: no answer of {'the incumbent' if one is None else 'sgnode'}")
                continue
            if case.alone:
                print(f"{configuration}/{case.name}: not sent to the incumbent: {case.alone}")
            compared += 1
            found = [
                (difference, reason_of(f"{configuration}/{case.name}", difference)) for difference in compare(case, one, other)
            ]
            used.update(entry for _, entry in found if entry is not None)
            surprising = [difference for difference, entry in found if entry is None]
            if surprising:
                unexpected.append(f"{configuration}/{case.name}")
            if surprising or (found and show_expected):
                print(f"{configuration}/{case.name}")
            for difference, entry in found:
                if entry is None:
                    show(difference)
                elif show_expected:
                    print(f"  {difference.path}: expected: {entry.reason}")
    for entry, times in used.items():
        print(f"expected, {times} times: {entry.names} {entry.paths}: {entry.reason}")
    for entry in EXPECTED:
        if entry not in used:
            print(f"expected, but not seen in this run: {entry.names} {entry.paths}")
    print(f"{compared} requests compared, {len(unexpected)} with unexpected differences")
    return unexpected


def show(difference: Difference) -> None:
    for side, value in (("incumbent", difference.incumbent), ("sgnode", difference.sgnode)):
        text = json.dumps(value, ensure_ascii=False)
        cut = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " …"
        print(f"  {difference.path:50} {side:10} {cut}")


if __name__ == "__main__":
    sys.exit(main())

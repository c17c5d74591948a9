"""The command line: `python3 -m tests.cluster tools|up|down|status|image`."""

from __future__ import annotations

import argparse

from tests.cluster import tools


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tests.cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("tools", help="build the named binaries or those of a tier, and print their paths")
    build.add_argument("names", nargs="+", metavar="NAME")
    options = parser.parse_args(argv)
    for path in tools.ensure(options.names).values():
        print(path)
    return 0

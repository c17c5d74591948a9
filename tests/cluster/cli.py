"""The command line: `python -m tests.cluster tools|up|down|status|image`.

`tools` runs on the standard library alone; the others need the project's virtual environment.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.cluster import tools
from tests.cluster.paths import cache_root


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    try:
        code: int = options.run(options)
        return code
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description="clusters and images for tests")
    commands = parser.add_subparsers(required=True)
    build = commands.add_parser("tools", help="build binaries, by name or tier, and print their paths")
    build.add_argument("names", nargs="+", metavar="NAME")
    build.set_defaults(run=_tools)
    for name, help_text, run in (
        ("up", "start or repair a cluster, and print its kubeconfig", _up),
        ("down", "remove a cluster and everything it left", _down),
        ("status", "say what runs; exits 1 when the cluster is not ready", _status),
    ):
        command = commands.add_parser(name, help=help_text)
        command.add_argument("--cluster", choices=("auto", "kind", "local"), default="auto")
        command.add_argument("--profile", choices=("full", "control-plane"), default="full")
        command.set_defaults(run=run)
    image = commands.add_parser("image", help="build an image, load it into the full cluster, or push it")
    image.add_argument("name", help="the image's name; its tag is the hash of its inputs")
    image.add_argument("dockerfile", type=Path)
    image.add_argument("--context", type=Path, default=Path())
    image.add_argument("--target")
    image.add_argument("--build-arg", action="append", default=[], metavar="KEY=VALUE")
    image.add_argument("--load", action="store_true", help="into the full cluster, which must be up")
    image.add_argument("--push", metavar="REGISTRY")
    image.add_argument("--cluster", choices=("auto", "kind", "local"), default="auto")
    image.set_defaults(run=_image)
    return parser


def _tools(options: argparse.Namespace) -> int:
    for path in tools.ensure(options.names).values():
        print(path)
    return 0


def _up(options: argparse.Namespace) -> int:
    from tests.cluster.choice import choose

    cluster = choose(options.cluster, options.profile)
    cluster.up()
    print(f"export KUBECONFIG={cluster.kubeconfig}")
    print(f'export PATH="{cache_root() / "bin" / "current"}:$PATH"')
    return 0


def _down(options: argparse.Namespace) -> int:
    from tests.cluster.choice import choose

    choose(options.cluster, options.profile).down()
    return 0


def _status(options: argparse.Namespace) -> int:
    from tests.cluster.choice import choose

    cluster = choose(options.cluster, options.profile)
    for name, state in cluster.status().items():
        print(f"{name:26} {state}")
    ready = cluster.ready()
    print("ready" if ready else "not ready")
    return 0 if ready else 1


def _image(options: argparse.Namespace) -> int:
    from tests.cluster import images
    from tests.cluster.choice import choose

    arguments = dict(pair.split("=", 1) for pair in options.build_arg)
    tag = images.build(options.dockerfile, options.context, options.name, build_args=arguments, target=options.target)
    if options.load:
        choose(options.cluster).load_image(tag)
    if options.push:
        tag = images.push(tag, options.push)
    print(tag)
    return 0

"""Builds and pushes the images: `python -m hack.build_images build`, `python -m hack.build_images push REGISTRY`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import images

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Built:
    """The tags of the three images of this working tree."""

    operator: str
    preflight: str
    trainer: str


def build(variant: str = "gpu") -> Built:
    """Build what is missing; a tag carries a hash of everything that goes in. `cpu` is the small trainer for tests."""
    trainer = ROOT / "trainer-image" / "Dockerfile"
    return Built(
        operator=images.build(ROOT / "Dockerfile", ROOT, "finetune-operator"),
        preflight=images.build(trainer, ROOT, "finetune-preflight", target="preflight"),
        trainer=images.build(
            trainer,
            ROOT,
            "finetune-trainer" if variant == "gpu" else f"finetune-trainer-{variant}",
            target="trainer",
            build_args={"VARIANT": variant},
        ),
    )


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    match arguments:
        case ["build"]:
            built = build()
            print(f"operator:  {built.operator}\npreflight: {built.preflight}\ntrainer:   {built.trainer}")
        case ["push", registry] if registry:
            built = build()
            for tag in (built.operator, built.preflight, built.trainer):
                print(f"pushed {images.push(tag, registry)}")
        case _:
            print("usage: python -m hack.build_images build | push REGISTRY/PREFIX", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

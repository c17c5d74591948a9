"""`python -m tests.chaos.store --faults N --seed S [--s3]`: the checkpoint store under random faults."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune_trainer.store.local import LocalStore
from finetune_trainer.store.objects import ObjectStore, S3Settings
from tests.chaos.store.ledger import Violation
from tests.chaos.store.rounds import Chaos, Tally
from tests.cluster.s3 import S3Server

_MEMORY = Path("/dev/shm")


@contextmanager
def local_place() -> Iterator[tuple[ObjectStore, Path, Path]]:
    """A store on a folder, in memory where that can be; its objects' folder, and one for local files."""
    with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None, prefix="chaos-") as folder:
        yield LocalStore(Path(folder) / "stored"), Path(folder) / "stored", Path(folder) / "work"


@contextmanager
def s3_place() -> Iterator[tuple[ObjectStore, Path, Path]]:
    """The same on a real S3 server."""
    from finetune_trainer.store.s3 import S3Store, s3_client

    with local_place() as (_, folder, work):
        with S3Server(folder=folder.with_name("s3")) as server:
            server.add_user("chaos")
            server.create_bucket("chaos", owner="chaos")
            settings = S3Settings(
                endpoint=server.endpoint, access_key_id="chaos", secret_access_key=server.users["chaos"]
            )
            yield S3Store(s3_client(settings), "chaos", endpoint=server.endpoint), server.data / "chaos", work


def summary(tally: Tally, seconds: float, broken: Violation | None) -> str:
    """One line with all counts."""
    found = {kind: int(broken is not None and broken.kind == kind) for kind in ("torn", "lost", "overwritten")}
    return (
        f"{tally.count} faults in {seconds:.0f} s: {found['torn']} torn loads, {found['lost']} lost checkpoints, "
        f"{found['overwritten']} overwrites; {tally.checks['commits']} commits, {tally.checks['restores']} restores, "
        f"{tally.checks['starts']} starts, {tally.checks['parts']} parts compared, {tally.outputs} outputs"
    )


def main() -> int:
    """Exit code 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.store", description=__doc__)
    parser.add_argument("--faults", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--s3", action="store_true", help="against a real S3 server instead of a folder")
    options = parser.parse_args()
    begun, broken = time.monotonic(), None
    with s3_place() if options.s3 else local_place() as (store, root, work):
        chaos = Chaos(store, root, work, options.seed)
        try:
            chaos.run(options.faults)
        except Violation as error:
            broken = error
    for title, counts in (("faults", chaos.tally.faults), ("calls they happened to", chaos.tally.calls)):
        print(f"{title}: " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    print(
        f"{'s3' if options.s3 else 'local'}, seed {options.seed}: "
        + summary(chaos.tally, time.monotonic() - begun, broken)
    )
    if broken:
        print(f"after {chaos.tally.count} faults: {broken}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

"""The real worker with a data loader that never gives the records of one step: as a volume that does not answer."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from finetune_trainer.worker import batches
from finetune_trainer.worker.main import main

STUCK_RANK = 1
RECORDS_READ = 5


def make_stuck() -> None:
    """Reading does not come back from the record after so many."""
    read, seen = batches.Records.__getitem__, []

    def get(self: batches.Records, index: int) -> Any:
        if len(seen) == RECORDS_READ:
            time.sleep(3600)
        seen.append(index)
        return read(self, index)

    batches.Records.__getitem__ = get  # type: ignore[method-assign]


if __name__ == "__main__":
    if os.environ["RANK"] == str(STUCK_RANK):
        make_stuck()
    sys.exit(main(sys.argv[1:]))

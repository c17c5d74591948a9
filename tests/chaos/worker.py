"""`--worker-module tests.chaos.worker`: the worker as a pod starts it, from a bare interpreter, with a journal."""

from __future__ import annotations

import os
import sys

from tests.chaos.journal import install

if __name__ == "__main__":
    install(os.environ)
    from finetune_trainer.worker.main import main

    sys.exit(main(sys.argv[1:]))

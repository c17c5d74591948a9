"""Write golden curves again: python -m tests.train.methods [name …]; without names, all of them."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.train.methods.cases import CASES
from tests.train.methods.golden import write_golden

if __name__ == "__main__":
    for case in CASES:
        if not sys.argv[1:] or case.name in sys.argv[1:]:
            with tempfile.TemporaryDirectory() as root:
                write_golden(case, Path(root) / "run")
            print(case.name)

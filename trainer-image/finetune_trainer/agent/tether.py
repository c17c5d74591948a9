"""`python -m finetune_trainer.agent.tether PARENT SIGNAL MODULE …`: becomes MODULE, and gets SIGNAL when PARENT ends.

Linux only. Asking for the parent-death signal between fork and exec would mean to run Python code in the child of a
process with threads, which can deadlock; this program asks for it and then replaces itself.
"""

from __future__ import annotations

import ctypes
import os
import sys

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> int:
    """Replaces this process; returns only if the parent is gone already."""
    parent, number, module, *rest = arguments
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number))
    if os.getppid() != int(parent):
        return 1
    os.execv(sys.executable, [sys.executable, "-m", module, *rest])  # noqa: S606  # fixed list, no shell wanted


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

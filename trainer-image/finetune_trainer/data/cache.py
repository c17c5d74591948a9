"""A folder that is made once, by whichever process of the node comes first, and shared by the others."""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_POLL_SECONDS = 0.2
Beat = Callable[[], None]


def made_once(folder: Path, make: Callable[[Path, Beat], None], beat: Beat) -> None:
    """folder exists and is complete when this returns: made here, by another process, or by an earlier attempt.

    make fills the folder that it is given and calls its second argument as it goes on, which tells the processes that
    wait that it lives; beat is called then. A maker that dies frees the lock, and the next process begins anew.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    marker = folder.with_name(f"{folder.name}.lock")
    with marker.open("ab") as lock:
        _wait(lock, marker, beat)
        if folder.is_dir():
            return
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()

        def go_on() -> None:
            marker.touch()
            beat()

        make(partial, go_on)
        partial.rename(folder)


def _wait(lock: BinaryIO, marker: Path, beat: Beat) -> None:
    """Until the lock is ours; beats only while its holder goes on."""
    seen = 0
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            touched = marker.stat().st_mtime_ns
            if touched != seen:
                seen = touched
                beat()
            time.sleep(_POLL_SECONDS)

"""The worker's log: one event per line, JSON unless a person looks on."""

from __future__ import annotations

import sys
from typing import Any

import structlog

Log = Any  # structlog's bound loggers have no static type of their own


def open_log(**bound: object) -> Log:
    """A logger on standard output whose every line carries bound, a time and a level."""
    renderer: Any = structlog.dev.ConsoleRenderer() if sys.stdout.isatty() else structlog.processors.JSONRenderer()
    return structlog.wrap_logger(
        structlog.WriteLogger(sys.stdout),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
        **bound,
    )

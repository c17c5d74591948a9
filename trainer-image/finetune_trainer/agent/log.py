"""The agent's log: one event per line on standard output, JSON in pods."""

from __future__ import annotations

import sys
from typing import Any

import structlog

from finetune_trainer.agent.redaction import Redactor

Log = Any  # structlog's bound loggers have no static type of their own


def open_log(log_format: str, redactor: Redactor, **bound: object) -> Log:
    """A logger whose every line carries bound, a time and a level, and holds no secret."""
    text = log_format == "text"
    renderer: Any = structlog.dev.ConsoleRenderer(colors=False) if text else structlog.processors.JSONRenderer()
    log = structlog.wrap_logger(
        structlog.WriteLogger(sys.stdout),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            redactor.event,
            renderer,
        ],
    )
    return log.bind(**bound)

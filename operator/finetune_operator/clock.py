"""Times as the API writes them: UTC, whole seconds, RFC 3339."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta


def parse_time(text: str) -> datetime:
    """The time that an API object names."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone(UTC)


def format_time(moment: datetime) -> str:
    """RFC 3339 in UTC, cut to the second."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def after(moment: datetime, seconds: float) -> str:
    """The time `seconds` after moment, rounded up to the next whole second."""
    later = moment + timedelta(seconds=seconds)
    return format_time(later + timedelta(seconds=math.ceil(later.microsecond / 10**6), microseconds=-later.microsecond))


def seconds_until(text: str, now: datetime) -> float:
    """Seconds from now to the time in text; negative when it has passed."""
    return (parse_time(text) - now).total_seconds()

"""Regular expressions that a job brings along: the faults that are faults in every dialect."""

from __future__ import annotations

import re
import warnings

# The trainer searches with a library that takes more than `re` does (\p{L}, ^?, (?|a), [\d-z]): only what is out of
# order in both counts here.
_FAULTS = (
    "bad character range",
    "bad escape (end",
    "missing )",
    "multiple repeat",
    "unbalanced parenthesis",
    "unexpected end of pattern",
    "unterminated character set",
)


def fault_of(pattern: str) -> str | None:
    """What makes pattern no regular expression in any dialect; None where the trainer has the last word."""
    if "[:" in pattern:  # a class such as [[:alpha:]] ends elsewhere for `re`
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sets within sets mean something else one day
            re.compile(pattern)
    except re.error as error:
        plain = "\\" not in error.msg  # a range from \d on is a minus sign to the trainer
        if (plain and error.msg.startswith(_FAULTS)) or (error.msg == "nothing to repeat" and error.pos == 0):
            return str(error)
    except (RecursionError, OverflowError):  # deeper or larger than `re` goes
        pass
    return None

"""All cases: each group of methods has a file of its own."""

from __future__ import annotations

from tests.train.methods.case import Case
from tests.train.methods.cases_causal import CASES as CAUSAL

CASES: tuple[Case, ...] = (*CAUSAL,)

"""All cases: each group of methods has a file of its own."""

from __future__ import annotations

from tests.train.methods.case import Case
from tests.train.methods.cases_causal import CASES as CAUSAL
from tests.train.methods.cases_data import CASES as DATA
from tests.train.methods.cases_distillation import CASES as DISTILLATION
from tests.train.methods.cases_experts import CASES as EXPERTS
from tests.train.methods.cases_features import CASES as FEATURES
from tests.train.methods.cases_preference import CASES as PREFERENCE
from tests.train.methods.cases_pretrain import CASES as PRETRAIN
from tests.train.methods.cases_reinforcement import CASES as REINFORCEMENT
from tests.train.methods.cases_tasks import CASES as TASKS
from tests.train.methods.cases_tuning import CASES as TUNING

CASES: tuple[Case, ...] = (
    *CAUSAL,
    *PREFERENCE,
    *REINFORCEMENT,
    *TASKS,
    *PRETRAIN,
    *DISTILLATION,
    *FEATURES,
    *DATA,
    *TUNING,
    *EXPERTS,
)

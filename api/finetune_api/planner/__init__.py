"""The planner: from a spec, what preflight found and the pools to a plan and a run file. Pure.

Reading order: support (what is refused), from_job (earlier jobs as models), references (places and credentials),
objective, tuning, optimization and settings (what is resolved and why), memory (the size rule), plan (the choice of a
pool), write (the run file).
"""

from finetune_api.planner.from_job import NotFinished, named_jobs, resolve, with_resolved
from finetune_api.planner.plan import make_plan
from finetune_api.planner.preflight import preflight_file
from finetune_api.planner.references import References, build_references, spec_digest
from finetune_api.planner.support import Unsupported, unsupported
from finetune_api.planner.write import Planned, Pool

__all__ = [
    "NotFinished",
    "Planned",
    "Pool",
    "References",
    "Unsupported",
    "build_references",
    "make_plan",
    "named_jobs",
    "preflight_file",
    "resolve",
    "spec_digest",
    "unsupported",
    "with_resolved",
]

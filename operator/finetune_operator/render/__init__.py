"""What children look like. Pure: from the job, its plan and its pool to manifests. Nothing here is ever re-rendered
over a live object: each child is created once.
"""

from finetune_operator.render.attempt import AttemptInput, attempt_children, attempt_job
from finetune_operator.render.plan import plan_config_map
from finetune_operator.render.preflight import preflight_config_map, preflight_job

__all__ = [
    "AttemptInput",
    "attempt_children",
    "attempt_job",
    "plan_config_map",
    "preflight_config_map",
    "preflight_job",
]

"""Jobs that the spec names by fromJob: waited for, and then fixed in status, so that they may go away later."""

from __future__ import annotations

from finetune_api.failures import FinetuneError
from finetune_api.planner import NotFinished, named_jobs, resolve
from finetune_api.status import ConditionType, State
from finetune_operator.decide.cause import Cause
from finetune_operator.decide.conditions import UNKNOWN
from finetune_operator.decide.draft import Draft
from finetune_operator.decide.preflight import refuse

WAITING = "WaitingForJob"
LOOK_SECONDS = 15.0  # nobody is woken when another job ends


def unresolved(draft: Draft) -> bool:
    """Whether a named job has no artifact yet or never will, which is then said."""
    known = {item.field for item in draft.status.resolved}
    views = {view.name: (view.spec, view.status) for view in draft.seen.named_jobs}
    for path, name in named_jobs(draft.spec).items():
        if path in known:
            continue
        if name == draft.seen.job.name:
            message = f"{path}.fromJob names the job itself; name an earlier one"
            refuse(draft, Cause("InvalidSpec", message, f"spec.{path}.fromJob"))
            return True
        try:
            found = resolve(draft.spec, path, views.get(name))
        except FinetuneError as error:
            refuse(draft, Cause(error.failure_class, str(error), error.field))
            return True
        except NotFinished as error:
            draft.mark(ConditionType.VALIDATED, UNKNOWN, WAITING, str(error))
            draft.be(State.PENDING, f"waits: {error}")
            draft.look(LOOK_SECONDS)
            return True
        draft.set(resolved=[*draft.status.resolved, found])
    return False

"""Carries out actions. Children are created once and never changed afterwards, but for their release."""

from __future__ import annotations

from collections.abc import Sequence

from finetune_operator.actions import Action, Create, Delete, Release
from finetune_operator.decide.obstacles import refusal
from finetune_operator.kube import ApiError, Conflict, Kube, NotFound
from finetune_operator.snapshot import Obstacle
from finetune_operator.views import Body, controller_uid

_REFUSED = (403, 422)


async def apply(kube: Kube, namespace: str, actions: Sequence[Action]) -> Obstacle | None:
    """Carries out the actions in order; stops at the first child that cannot be created and says what is in its way.

    Raises ApiError where trying again later is the answer.
    """
    for action in actions:
        match action:
            case Create():
                obstacle = await _create(kube, action)
                if obstacle is not None:
                    return obstacle
            case Release(name, uid):
                await _release(kube, namespace, name, uid)
            case Delete(kind, name, uid):
                await kube.delete(kind, name, namespace, uid)
    return None


async def _create(kube: Kube, action: Create) -> Obstacle | None:
    try:
        await kube.create(action.manifest)
    except Conflict as error:
        return await _check_owner(kube, action, error)
    except ApiError as error:
        # A right that the operator lacks, or a namespace on its way out, is no fault of the job.
        ours = "cannot create resource" in error.message or "being terminated" in error.message
        if error.code not in _REFUSED or ours:
            raise
        cause = refusal(error.message)
        return Obstacle(action.kind, action.name, cause.failure_class, cause.message)
    return None


async def _check_owner(kube: Kube, action: Create, conflict: Conflict) -> Obstacle | None:
    namespace = str(action.manifest["metadata"]["namespace"])
    try:
        found: Body = await kube.get(action.kind, action.name, namespace)
    except NotFound:
        raise conflict from None  # it went away in between: try again
    if controller_uid(found) == controller_uid(action.manifest):
        if "deletionTimestamp" in found["metadata"]:
            raise conflict
        return None
    message = f"{action.kind} {namespace}/{action.name} exists and is not ours; delete or rename it"
    return Obstacle(action.kind, action.name, "NameTaken", message)


async def _release(kube: Kube, namespace: str, name: str, uid: str) -> None:
    try:
        await kube.merge("Job", name, namespace, {"metadata": {"uid": uid}, "spec": {"suspend": False}})
    except NotFound:
        return  # the next look sees that it is gone

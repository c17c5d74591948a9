"""The main flow: observe → decide → apply → status, again until nothing is left to do."""

from __future__ import annotations

from dataclasses import dataclass, replace

import structlog

from finetune_operator import metrics
from finetune_operator.apply import apply
from finetune_operator.config import Config
from finetune_operator.decide import decide
from finetune_operator.events import publish
from finetune_operator.kube import Kube, NotFound
from finetune_operator.observe import observe
from finetune_operator.status import write_status

log = structlog.get_logger()
MOST_STEPS = 16  # the longest chain of steps that need nothing from outside has 8
SOON = 1.0


@dataclass(frozen=True)
class Reconciler:
    """Brings one job a step further each time it is called with the job's key."""

    kube: Kube
    config: Config

    async def __call__(self, key: str) -> float | None:
        """Does all that can be done now. Returns the seconds after which to look again, None for not before a change.

        A crash between any two calls is safe: each step is decided anew from what the API server holds.
        """
        for _ in range(MOST_STEPS):
            seen = await observe(self.kube, key, self.config)
            if seen is None:
                return None
            decision = decide(seen, self.config)
            obstacle = await apply(self.kube, seen.job.namespace, decision.actions)
            if obstacle is not None:
                decision = decide(replace(seen, obstacles=(obstacle,)), self.config)
            try:
                written = await write_status(self.kube, seen.job, decision.status)
            except NotFound:
                return None  # deleted since it was read
            if written:
                metrics.STATUS_WRITES.inc()
                log.info("status", job=key, state=decision.status.state, message=decision.status.message)
                await publish(self.kube, seen.job, decision.events, seen.now, self.config.identity)
                metrics.count_events(decision.events)
                metrics.count_change(seen.status, decision.status)
            if obstacle is not None or not (decision.actions or written):
                return decision.look_again
        log.warning("many_steps", job=key)
        return SOON

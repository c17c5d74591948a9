"""Which job owns an output. One claim per owner; a later owner is one that resumed the same run.

`CLAIM.json` is the first claim. A job that takes a matching run over writes `CLAIM-1.json`, the next
`CLAIM-2.json`: each by conditional write, so that of two jobs one gets it. The highest one counts.
"""

from __future__ import annotations

import re
from enum import StrEnum

from finetune_trainer.store.documents import Claim
from finetune_trainer.store.errors import ConditionalWriteUnsupported, OutputInUse
from finetune_trainer.store.objects import ObjectStore, join_key

_CLAIM_NAME = re.compile(r"CLAIM(?:-([1-9]\d{0,8}))?\.json")
_DIGESTS = {"model_digest": "model", "data_digest": "data", "method_digest": "method"}


class OnExisting(StrEnum):
    """What to do when another job has written to the output: spec.output.onExisting."""

    FAIL = "Fail"
    RESUME = "Resume"


def claim_output(store: ObjectStore, prefix: str, claim: Claim, on_existing: str = OnExisting.FAIL) -> Claim:
    """Own the output under prefix; returns the claim that is stored. To be called at every start.

    The same job's second call finds its own claim. Another job's claim is taken over only with
    OnExisting.RESUME and equal model, data and method digests. Raises OutputInUse, which names the
    owner or what differs, and ConditionalWriteUnsupported.
    """
    while True:
        if _create(store, join_key(prefix, "CLAIM.json"), claim):
            return claim
        number = _newest(store, prefix) or 0
        owner = _read(store, prefix, number)
        differs = [word for name, word in _DIGESTS.items() if getattr(claim, name) != getattr(owner, name)]
        if owner.job_uid != claim.job_uid and on_existing != OnExisting.RESUME:
            raise OutputInUse(
                f"{store.uri(prefix)} belongs to the job {owner.namespace}/{owner.name} "
                f"(UID {owner.job_uid}). Choose another output.uri, or set output.onExisting: Resume "
                "to continue the same run.",
                field="spec.output.uri",
            )
        if differs:
            raise OutputInUse(
                f"{store.uri(prefix)} holds a run of the job {owner.namespace}/{owner.name} with another "
                f"{', another '.join(differs)}, so it cannot be continued. Choose another output.uri.",
                field="spec.output.uri",
            )
        if owner.job_uid == claim.job_uid:
            return owner
        if _create(store, join_key(prefix, f"CLAIM-{number + 1}.json"), claim):
            return claim


def _create(store: ObjectStore, key: str, claim: Claim) -> bool:
    data = claim.to_bytes()
    created = store.put_if_absent(key, data)
    # A server that ignores the condition answers success to both writes: found out here, before any work.
    if created and store.put_if_absent(key, data):
        raise ConditionalWriteUnsupported(
            f"the storage of {store.uri(key)} ignores If-None-Match, without which two jobs could overwrite "
            "one another. Use a server with conditional writes."
        )
    return created


def current_claim(store: ObjectStore, prefix: str) -> Claim | None:
    """The claim that counts: that of the last job that took the run over; None if nobody owns the output."""
    number = _newest(store, prefix)
    return _read(store, prefix, number) if number is not None else None


def _newest(store: ObjectStore, prefix: str) -> int | None:
    """The number of the claim that counts, 0 for CLAIM.json."""
    base = join_key(prefix, "CLAIM")
    matches = (_CLAIM_NAME.fullmatch("CLAIM" + item.key.removeprefix(base)) for item in store.list(base))
    return max((int(match[1] or 0) for match in matches if match), default=None)


def _read(store: ObjectStore, prefix: str, number: int) -> Claim:
    return Claim.read(store, join_key(prefix, f"CLAIM-{number}.json" if number else "CLAIM.json"))

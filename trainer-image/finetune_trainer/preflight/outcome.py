"""What the checks found so far."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from finetune_api.status import DataFacts, Finding, ModelFacts
from finetune_trainer.preflight.labels import LabelsSeen
from finetune_trainer.store.documents import Claim


@dataclass
class Outcome:
    """Added to by a check as it goes, so that what it found is kept if it has to be given up.

    claim: who owns the output, if anybody does. digests, weight_bytes: of further models, by the spec path of their
    URI. heads: the label names that a model's config gives its head, by the same path; () where it gives none.
    labels: what classes and tags the records have.
    """

    findings: list[Finding] = field(default_factory=list)
    model: ModelFacts | None = None
    data: DataFacts | None = None
    claim: Claim | None = None
    digests: dict[str, str] = field(default_factory=dict)
    weight_bytes: dict[str, int] = field(default_factory=dict)
    heads: dict[str, tuple[str, ...]] = field(default_factory=dict)
    labels: LabelsSeen | None = None

    def copy(self) -> Outcome:
        """What it holds now; a check that still runs does not change it."""
        return joined([self])


def joined(outcomes: Iterable[Outcome]) -> Outcome:
    """All that the outcomes of several checks hold."""
    whole = Outcome()
    for part in outcomes:
        whole.findings += part.findings
        whole.model = whole.model or part.model
        whole.data = whole.data or part.data
        whole.claim = whole.claim or part.claim
        whole.labels = whole.labels or part.labels
        whole.digests |= part.digests
        whole.weight_bytes |= part.weight_bytes
        whole.heads |= part.heads
    return whole

"""Run the checks side by side and put their findings together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from finetune_api import naming
from finetune_api.failures import FinetuneError
from finetune_api.runfile import InputKind, PreflightFile
from finetune_api.status import Finding, Preflight
from finetune_trainer.preflight.checks import check_claim, check_model, check_output, check_target
from finetune_trainer.preflight.document import INFO, finding, ranked
from finetune_trainer.preflight.further import check_further
from finetune_trainer.preflight.labels import check_labels
from finetune_trainer.preflight.outcome import Outcome, joined
from finetune_trainer.preflight.records import check_data
from finetune_trainer.sources.place import Reach

STALL_SECONDS = 30.0
"""A check that got no answer and read no record for this long is given up."""
_POLL_SECONDS = 0.05
Action = Callable[[PreflightFile, Reach, Outcome], None]


@dataclass
class _Check:
    """One check in a thread of its own. last_beat: monotonic seconds."""

    what: str
    uri: str
    spec_field: str
    outcome: Outcome = field(default_factory=Outcome)
    last_beat: float = field(default_factory=time.monotonic)
    thread: threading.Thread | None = None

    def beat(self) -> None:
        self.last_beat = time.monotonic()

    def start(self, action: Callable[[Outcome], None]) -> None:
        self.thread = threading.Thread(target=self._run, args=(action,), name=f"preflight-{self.what}", daemon=True)
        self.thread.start()

    def _run(self, action: Callable[[Outcome], None]) -> None:
        outcome = self.outcome
        try:
            action(outcome)
        except FinetuneError as error:
            outcome.findings.append(finding(error))
        except Exception as error:
            outcome.findings.append(
                Finding(
                    failure_class="Internal",
                    field=self.spec_field,
                    message=f"The check of the {self.what} failed with {type(error).__name__}. Please report it.",
                )
            )

    def done(self, stall_seconds: float) -> bool:
        """Whether the check has ended, or has been silent for too long, which becomes a finding."""
        assert self.thread is not None
        if not self.thread.is_alive():
            return True
        if time.monotonic() - self.last_beat < stall_seconds:
            return False
        # From here on the thread writes to an outcome that nobody reads.
        self.outcome = self.outcome.copy()
        self.outcome.findings.append(
            Finding(
                failure_class="StorageUnavailable",
                field=self.spec_field,
                message=f"{self.uri} did not answer for {stall_seconds:.0f} s. Check storage.endpoint, and that it can be "
                "reached from the cluster.",
            )
        )
        return True


def run_preflight(
    file: PreflightFile,
    env: Mapping[str, str],
    *,
    claims: Path = Path(naming.CLAIMS_PATH),
    stall_seconds: float = STALL_SECONDS,
) -> Preflight:
    """What stands in the way of the job, and the facts that the planner needs. Raises nothing for what it finds.

    env: credentials profiles, HF_ENDPOINT, AWS_*. claims: where pvc:// claims are mounted. Ends at the latest
    stall_seconds after the last answer of any storage.
    """

    def reach(check: _Check) -> Reach:
        return Reach(env=env, claims=claims, allow_file=file.local, patient=False, beat=check.beat)

    checks = _checks(file)
    for check, action in checks:
        check.start(partial(action, file, reach(check)))
    waiting = [check for check, _ in checks]
    while waiting := [check for check in waiting if not check.done(stall_seconds)]:
        time.sleep(_POLL_SECONDS)
    whole = joined(check.outcome for check, _ in checks)
    for together in (partial(check_claim, file, whole), partial(check_labels, file, whole.labels, whole.heads)):
        try:
            together()
        except FinetuneError as error:
            whole.findings.append(finding(error))
    findings = ranked(whole.findings)
    return Preflight(
        ok=all(item.failure_class == INFO for item in findings),
        spec_digest=file.spec_digest,
        model=whole.model,
        data=whole.data,
        digests=whole.digests,
        further_weight_bytes=whole.weight_bytes,
        findings=findings,
        findings_total=len(findings),
    )


def _checks(file: PreflightFile) -> list[tuple[_Check, Action]]:
    """The checks of a job, in the order in which their findings are told."""
    sources = ", ".join(source.uri for source in file.sources)
    checks: list[tuple[_Check, Action]] = [
        (_Check("model", file.model.uri, "spec.model.uri"), check_model),
        (_Check("data", sources, "spec.dataset.sources[0].uri"), check_data),
        (_Check("output", file.output.uri, "spec.output.uri"), check_output),
    ]
    models = [item for item in file.further if item.kind is not InputKind.DATA]
    if models:
        places = ", ".join(item.reference.uri for item in models)
        checks.append((_Check("further models", places, f"spec.{models[0].field}"), check_further))
    if (publish := file.publish) is not None:
        check = _Check("place to publish", publish.target.uri, "spec.output.publish.uri")
        checks.append((check, lambda _, reach, outcome: check_target(publish, reach, outcome)))
    return checks

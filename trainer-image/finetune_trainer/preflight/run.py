"""Run the checks side by side and put their findings together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from finetune_api import naming
from finetune_api.failures import FinetuneError
from finetune_api.runfile import PreflightFile
from finetune_api.status import Finding, Preflight
from finetune_trainer.preflight.checks import Outcome, check_claim, check_data, check_model, check_output
from finetune_trainer.preflight.document import INFO, finding, ranked
from finetune_trainer.sources.place import Reach

STALL_SECONDS = 30.0
"""A check that got no answer and read no record for this long is given up."""
_POLL_SECONDS = 0.05


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
        self.outcome = Outcome(list(self.outcome.findings), self.outcome.model, self.outcome.data, self.outcome.claim)
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

    model = _Check("model", file.model.uri, "spec.model.uri")
    data = _Check("data", ", ".join(source.uri for source in file.sources), "spec.dataset.sources[0].uri")
    output = _Check("output", file.output.uri, "spec.output.uri")
    model.start(lambda outcome: check_model(file, reach(model), outcome))
    data.start(lambda outcome: check_data(file, reach(data), outcome))
    output.start(lambda outcome: check_output(file, reach(output), outcome))
    waiting = [model, data, output]
    while waiting := [check for check in waiting if not check.done(stall_seconds)]:
        time.sleep(_POLL_SECONDS)
    whole = Outcome(
        [item for check in (model, data, output) for item in check.outcome.findings],
        model.outcome.model,
        data.outcome.data,
        output.outcome.claim,
    )
    try:
        check_claim(file, whole)
    except FinetuneError as error:
        whole.findings.append(finding(error))
    findings = ranked(whole.findings)
    return Preflight(
        ok=all(item.failure_class == INFO for item in findings),
        spec_digest=file.spec_digest,
        model=whole.model,
        data=whole.data,
        findings=findings,
        findings_total=len(findings),
    )

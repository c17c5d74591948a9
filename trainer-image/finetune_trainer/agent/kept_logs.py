"""What is kept of a failed attempt in the output, where it outlives the pod: a report and what the workers printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from finetune_api.documents import ProgressDocument
from finetune_trainer.agent.ending import MESSAGE_CHARACTERS, End
from finetune_trainer.agent.failure_report import failure_report
from finetune_trainer.agent.redaction import Redactor
from finetune_trainer.store.objects import ObjectStore, join_key


def keep_logs(
    store: ObjectStore,
    prefix: str,
    end: End,
    document: ProgressDocument,
    logs: Mapping[int, str],
    redactor: Redactor,
    *,
    node: int = 0,
) -> str:
    """A report of this node and the end of each rank's log are stored, without secrets; the address of their folder.

    document: how far the attempt came. Raises StoreError.
    """
    folder = join_key(prefix, f"logs/attempt-{document.attempt}")
    report = "report.md" if node == 0 else f"report-node-{node}.md"
    store.put(join_key(folder, report), redactor.text(failure_report(end, document, logs)).encode())
    for rank, text in logs.items():
        store.put(join_key(folder, f"rank-{rank}.log"), redactor.text(text).encode())
    return store.uri(folder)


def with_address(end: End, address: str) -> End:
    """end, whose message names where report and logs are, however long it was."""
    told = f" A report, beside the end of each rank's log, is in {address}/."
    message = end.message[: max(0, MESSAGE_CHARACTERS - len(told))]
    return replace(end, message=message + told)

"""What the workers printed last, in the output: it outlives the pod."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from finetune_trainer.agent.ending import MESSAGE_CHARACTERS, End
from finetune_trainer.agent.redaction import Redactor
from finetune_trainer.store.objects import ObjectStore, join_key


def keep_logs(store: ObjectStore, prefix: str, attempt: int, logs: Mapping[int, str], redactor: Redactor) -> str:
    """The end of each rank's log is stored, without secrets; the address of their folder. Raises StoreError."""
    folder = join_key(prefix, f"logs/attempt-{attempt}")
    for rank, text in logs.items():
        store.put(join_key(folder, f"rank-{rank}.log"), redactor.text(text).encode())
    return store.uri(folder)


def with_address(end: End, address: str) -> End:
    """end, whose message names where the logs are, however long it was."""
    told = f" The end of each rank's log is in {address}/."
    message = end.message[: max(0, MESSAGE_CHARACTERS - len(told))]
    return replace(end, message=message + told)

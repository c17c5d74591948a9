"""The run file and what it names: read strictly, fetched, and checked against what was planned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune_api.failures import FinetuneError
from finetune_api.runfile import Input, InputKind, RunFile
from finetune_trainer.agent.workdir import WorkDir, read_json, write_whole
from finetune_trainer.sources import Fetched, Purpose, Reach, SourceFile, data_digest, fetch

_MAX_RUN_FILE_BYTES = 4 << 20


def read_run_file(path: Path) -> RunFile:
    """The run file; raises FinetuneError(InvalidSpec) that names the file and the first wrong field."""
    try:
        with path.open("rb") as file:
            return RunFile.from_json(json.loads(file.read(_MAX_RUN_FILE_BYTES)))
    except OSError as error:
        message = f"cannot read the run file {path}: {error.strerror}."
        raise FinetuneError(message, failure_class="InvalidSpec") from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "document"
        raise FinetuneError(
            f"the run file {path} is not valid: {place}: {first['msg']}. "
            "Operator and trainer have to be of one release.",
            failure_class="InvalidSpec",
        ) from None
    except ValueError as error:
        raise FinetuneError(f"the run file {path} is not JSON: {error}.", failure_class="InvalidSpec") from None


def fetch_inputs(run: RunFile, work: WorkDir, reach: Reach) -> bool:
    """Everything that run.inputs() lists is complete below WORK/inputs and is what the plan was made from.

    False if an earlier attempt on this disk had fetched them, as under `finetune run`: nothing is fetched then.
    Raises FinetuneError of the sources, and DataInvalid or InvalidSpec if something changed since preflight.
    """
    wanted = _wanted(run)
    if read_json(work.fetched_file) == wanted:
        return False
    work.fetched_file.unlink(missing_ok=True)
    shutil.rmtree(work.inputs, ignore_errors=True)
    _fetch(run, work, reach)
    write_whole(work.fetched_file, json.dumps(wanted))
    return True


def _wanted(run: RunFile) -> dict[str, Any]:
    """What tells that a disk holds the inputs of this run and no other."""
    return {
        "data": run.dataset.digest,
        "inputs": [[item.folder, item.digest, item.reference.to_json()] for item in run.inputs()],
    }


def _fetch(run: RunFile, work: WorkDir, reach: Reach) -> None:
    data: list[tuple[str, tuple[SourceFile, ...]]] = []
    for item in run.inputs():
        got = _fetch_one(item, work, reach)
        if item.kind is InputKind.DATA:
            data.append((item.reference.uri, got.files))
        elif got.digest != item.digest:
            raise FinetuneError(
                f"{item.reference.uri} has changed since the run was planned. Put the same files back, or clone the "
                f"job; for an hf:// address name a commit in {item.field.removesuffix('uri')}revision.",
                failure_class="InvalidSpec",
                field=f"spec.{item.field}",
            )
    if data_digest(data) != run.dataset.digest:
        raise FinetuneError(
            "the dataset has changed since the run was planned. Put the same files back, or clone the job.",
            failure_class="DataInvalid",
            field="spec.dataset.sources",
        )


def _fetch_one(item: Input, work: WorkDir, reach: Reach) -> Fetched:
    purpose = Purpose[item.kind.name]
    return fetch(item.reference, work.inputs / item.folder, purpose=purpose, field=item.field, reach=reach)

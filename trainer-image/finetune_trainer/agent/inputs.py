"""The run file and what it names: read strictly, fetched, and checked against what was planned."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune_api.failures import FinetuneError
from finetune_api.runfile import Reference, RunFile
from finetune_trainer.agent.workdir import WorkDir, read_json, write_whole
from finetune_trainer.sources import Fetched, Purpose, Reach, data_digest, fetch

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
    """Model and data are complete below WORK/inputs and are what the plan was made from.

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
    references = [run.model.source, *run.dataset.sources, *([run.dataset.validation] if run.dataset.validation else [])]
    return {
        "model": run.model.digest,
        "data": run.dataset.digest,
        "references": [reference.to_json() for reference in references],
    }


def _fetch(run: RunFile, work: WorkDir, reach: Reach) -> None:
    model = fetch(run.model.source, work.inputs / "model", purpose=Purpose.MODEL, field="model.uri", reach=reach)
    if model.digest != run.model.digest:
        raise FinetuneError(
            f"{run.model.source.uri} has changed since the run was planned. Put the same model back, or clone the "
            "job; for an hf:// model name a commit in model.revision.",
            failure_class="InvalidSpec",
            field="spec.model.uri",
        )
    fetched = _fetch_data(run, work, reach)
    if data_digest([(reference.uri, got.files) for reference, got in fetched]) != run.dataset.digest:
        raise FinetuneError(
            "the dataset has changed since the run was planned. Put the same files back, or clone the job.",
            failure_class="DataInvalid",
            field="spec.dataset.sources",
        )


def _fetch_data(run: RunFile, work: WorkDir, reach: Reach) -> Sequence[tuple[Reference, Fetched]]:
    fetched = []
    for index, source in enumerate(run.dataset.sources):
        got = fetch(
            source,
            work.inputs / "data" / str(index),
            purpose=Purpose.DATA,
            field=f"dataset.sources[{index}].uri",
            reach=reach,
        )
        fetched.append((source, got))
    if run.dataset.validation is not None:
        got = fetch(
            run.dataset.validation,
            work.inputs / "validation",
            purpose=Purpose.DATA,
            field="dataset.validation.source.uri",
            reach=reach,
        )
        fetched.append((run.dataset.validation, got))
    return fetched

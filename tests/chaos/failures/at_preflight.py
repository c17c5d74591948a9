"""Mistakes that preflight meets, before a GPU is held."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from finetune_api.planner import spec_digest
from finetune_trainer.preflight import encode_preflight, exit_code, run_preflight
from finetune_trainer.store import objects
from finetune_trainer.store.claims import claim_output
from finetune_trainer.store.documents import Claim
from tests.chaos.failures.scenario import SPEC, Ending, Place, Scenario, scenario
from tests.train.preflight.local import ASKED, LABELLED, Folder, classifier, faults
from tests.train.sources.making import PICKLE, model_files, profile_env

DATA = "spec.dataset.sources[0].uri"
_DEAD = "http://127.0.0.1:9"


def _checked(folder: Folder, environment: Mapping[str, str] | None = None, **changes: Any) -> Ending:
    result = run_preflight(folder.file(specDigest=spec_digest(SPEC), **changes), dict(environment or {}))
    first = faults(result)[0]
    left = encode_preflight(result).decode()
    return Ending(exit_code(result), first.failure_class, first.message, first.field, left)


def _with_rows(place: Place, text: str, **changes: Any) -> Ending:
    folder = Folder(place.folder)
    (place.folder / "train/rows.jsonl").write_text(text)
    return _checked(folder, **changes)


def _with_keys(place: Place, *, output: str = "s3://team-a/out", endpoint: str | None = None, **keys: str) -> Ending:
    """Model and data on this machine, the output on the S3 server with the job's keys."""
    environment = profile_env("TEAM", place.s3.environment("team-a")) | keys
    access = {"profile": "team", "endpoint": endpoint or place.s3.endpoint}
    return _checked(Folder(place.folder), environment, output={"uri": output, "access": access})


def _lines(rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@scenario("broken-json", "DataInvalid", DATA, "rows.jsonl line 31", "not valid JSON at column")
def broken_json(place: Place) -> Ending:
    return _with_rows(place, _lines(ASKED) + '{"prompt": "What?", "completion": \n')


@scenario("missing-column", "DataInvalid", DATA, "line 31", "there is no column 'completion'")
def missing_column(place: Place) -> Ending:
    return _with_rows(place, _lines(ASKED) + '{"prompt": "What?"}\n')


@scenario("empty-data", "DataInvalid", DATA, "holds no record")
def empty_data(place: Place) -> Ending:
    return _with_rows(place, "")


@scenario("not-utf-8", "DataInvalid", DATA, "not UTF-8 at byte")
def not_utf_8(place: Place) -> Ending:
    folder = Folder(place.folder)
    with (place.folder / "train/rows.jsonl").open("ab") as file:
        file.write(b'{"prompt": "\xff", "completion": "x"}\n')
    return _checked(folder)


@scenario("unknown-format", "DataInvalid", "spec.dataset.columns", "The format of the data is not clear")
def unknown_format(place: Place) -> Ending:
    return _with_rows(place, '{"source": "a", "goal": "b"}\n')


@scenario("other-objectives-data", "DataInvalid", "spec.dataset.columns", "objective DPO needs Preference")
def other_objectives_data(place: Place) -> Ending:
    return _checked(Folder(place.folder), objective="DPO")


@scenario("one-label", "DataInvalid", DATA, "Every training record has the label 'yes'")
def one_label(place: Place) -> Ending:
    folder = Folder(place.folder)
    folder.put_model("model", classifier(("no", "yes")))
    folder.put("train", [{**row, "label": "yes"} for row in LABELLED])
    return _checked(folder, task="SequenceClassification")


@scenario("unknown-column-in-template", "InvalidSpec", "spec.dataset.promptTemplate", "names the column 'reply'")
def unknown_column_in_template(place: Place) -> Ending:
    return _checked(Folder(place.folder), promptTemplate="{prompt} {reply}")


@scenario("missing-file", "DataNotFound", DATA, "absent")
def missing_file(place: Place) -> Ending:
    folder = Folder(place.folder)
    return _checked(folder, sources=[{"uri": folder.uri("absent.jsonl"), "access": {}}])


@scenario("missing-model", "ModelNotFound", "spec.model.uri", "absent")
def missing_model(place: Place) -> Ending:
    folder = Folder(place.folder)
    return _checked(folder, model={"uri": folder.uri("absent"), "access": {}})


@scenario("unknown-architecture", "ModelUnsupported", "spec.model.uri", "model type 'oddity' is not supported")
def unknown_architecture(place: Place) -> Ending:
    folder = Folder(place.folder)
    folder.put_model("model", model_files(config={"model_type": "oddity"}))
    return _checked(folder)


@scenario("pickled-weights", "UnsafeFile", "spec.model.uri", "safetensors")
def pickled_weights(place: Place) -> Ending:
    folder = Folder(place.folder)
    (place.folder / "model/model.safetensors").unlink()
    (place.folder / "model/pytorch_model.bin").write_bytes(PICKLE)
    return _checked(folder)


@scenario("wrong-secret-key", "CredentialsRejected", "spec.credentials", "the secret key is wrong")
def wrong_secret_key(place: Place) -> Ending:
    return _with_keys(place, FINETUNE_CRED_TEAM_AWS_SECRET_ACCESS_KEY="not-the-right-one")


@scenario("unknown-key-id", "CredentialsRejected", "spec.credentials", "does not know this access key id")
def unknown_key_id(place: Place) -> Ending:
    return _with_keys(place, FINETUNE_CRED_TEAM_AWS_ACCESS_KEY_ID="nobody")


@scenario("bucket-of-others", "CredentialsRejected", "spec.credentials", "may not do that")
def bucket_of_others(place: Place) -> Ending:
    return _with_keys(place, output="s3://foreign/out")


@scenario("missing-bucket", "BucketNotFound", "spec.output.uri", "Create the bucket")
def missing_bucket(place: Place) -> Ending:
    return _with_keys(place, output="s3://no-such-bucket/out")


@scenario("dead-endpoint", "StorageUnavailable", "spec.storage", "127.0.0.1:9")
def dead_endpoint(place: Place) -> Ending:
    return _with_keys(place, endpoint=_DEAD)


@scenario("output-of-another-job", "OutputInUse", "spec.output.uri", "belongs to the job team-a/earlier")
def output_of_another_job(place: Place) -> Ending:
    folder = Folder(place.folder)
    store, prefix = objects.open_store(folder.uri("out"))
    digests = {"model_digest": "m", "data_digest": "d", "method_digest": "x"}
    claim_output(store, prefix, Claim(job_uid="other", namespace="team-a", name="earlier", **digests))
    return _checked(folder)


SCENARIOS = [found for found in list(globals().values()) if isinstance(found, Scenario)]

"""Who owns an output."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from finetune_trainer.store.claims import OnExisting, claim_output
from finetune_trainer.store.documents import Claim
from finetune_trainer.store.errors import (
    CheckpointInvalid,
    ConditionalWriteUnsupported,
    OutputInUse,
    StorageUnavailable,
)
from finetune_trainer.store.objects import S3Settings, join_key
from finetune_trainer.store.s3 import S3Store, s3_client
from tests.train.store.conftest import Between, Place


def claim(job: str, **digests: str) -> Claim:
    """The claim of a job in the namespace team-a."""
    values: Any = {"model_digest": "m1", "data_digest": "d1", "method_digest": "t1"} | digests
    return Claim(job_uid=f"uid-{job}", namespace="team-a", name=job, **values)


def test_the_first_job_gets_the_output_and_finds_it_again(place: Place) -> None:
    assert claim_output(place.store, place.prefix, claim("a")).job_uid == "uid-a"
    assert claim_output(place.store, place.prefix, claim("a")).job_uid == "uid-a"
    assert place.list_keys() == ["CLAIM.json"]


def test_another_job_is_told_who_owns_the_output_and_what_to_change(place: Place) -> None:
    claim_output(place.store, place.prefix, claim("a"))
    with pytest.raises(OutputInUse, match=r"job team-a/a \(UID uid-a\).*output\.uri.*onExisting: Resume") as caught:
        claim_output(place.store, place.prefix, claim("b"))
    assert (caught.value.failure_class, caught.value.field) == ("OutputInUse", "spec.output.uri")
    assert Claim.read(place.store, join_key(place.prefix, "CLAIM.json")).job_uid == "uid-a"


@pytest.mark.parametrize(
    ("digests", "told"),
    [
        ({"model_digest": "m2"}, "another model,"),
        ({"data_digest": "d2"}, "another data,"),
        ({"method_digest": "t2"}, "another method,"),
        ({"model_digest": "m2", "method_digest": "t2"}, "another model, another method,"),
    ],
)
def test_resume_refuses_another_run_and_names_what_differs(place: Place, digests: dict[str, str], told: str) -> None:
    claim_output(place.store, place.prefix, claim("a"))
    with pytest.raises(OutputInUse, match=re.escape(told)):
        claim_output(place.store, place.prefix, claim("b", **digests), OnExisting.RESUME)
    assert place.list_keys() == ["CLAIM.json"]


def test_resume_takes_the_same_run_over_for_good(place: Place) -> None:
    claim_output(place.store, place.prefix, claim("a"))
    assert claim_output(place.store, place.prefix, claim("b"), OnExisting.RESUME).job_uid == "uid-b"
    assert claim_output(place.store, place.prefix, claim("b"), OnExisting.RESUME).job_uid == "uid-b"
    with pytest.raises(OutputInUse, match="team-a/b"):
        claim_output(place.store, place.prefix, claim("a"))
    assert claim_output(place.store, place.prefix, claim("c"), OnExisting.RESUME).job_uid == "uid-c"
    assert place.list_keys() == ["CLAIM-1.json", "CLAIM-2.json", "CLAIM.json"]


def test_of_jobs_that_claim_at_once_one_owns_the_output(place: Place) -> None:
    def attempt(job: str) -> str:
        try:
            return claim_output(place.store, place.prefix, claim(job)).job_uid
        except OutputInUse:
            return "refused"

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(attempt, "abcdef"))
    assert results.count("refused") == 5
    owner = Claim.read(place.store, join_key(place.prefix, "CLAIM.json"))
    assert owner.job_uid in results


@pytest.mark.parametrize("content", [b"{", b'{"version": 1, "extra": true}', b"\xff", b"x" * (5 << 20)])
def test_a_damaged_claim_is_told_not_taken(place: Place, content: bytes) -> None:
    place.store.put(join_key(place.prefix, "CLAIM.json"), content)
    with pytest.raises(CheckpointInvalid, match=r"CLAIM\.json"):
        claim_output(place.store, place.prefix, claim("a"))
    assert place.store.get(join_key(place.prefix, "CLAIM.json")) == content


def test_a_storage_that_ignores_conditions_is_found_out_at_once_and_every_time(settings: S3Settings) -> None:
    class Ignoring(Between):
        def put_object(self, **arguments: Any) -> Any:
            arguments.pop("IfNoneMatch", None)
            return self.real.put_object(**arguments)

    store = S3Store(Ignoring(s3_client(settings)), "team-a")
    for _ in range(2):
        with pytest.raises(ConditionalWriteUnsupported, match="ignores If-None-Match"):
            claim_output(store, "ignoring", claim("a"))


def test_a_claim_whose_answer_was_lost_is_ones_own(place: Place) -> None:
    class Losing(Between):
        lost = False

        def put_if_absent(self, key: str, data: bytes) -> bool:
            done = self.real.put_if_absent(key, data)
            if not self.lost:
                self.lost = True
                raise StorageUnavailable("the answer was lost")
            return done

    store = Losing(place.store)
    with pytest.raises(StorageUnavailable):
        claim_output(store, place.prefix, claim("a"))
    assert claim_output(store, place.prefix, claim("a")).job_uid == "uid-a"

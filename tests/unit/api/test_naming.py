"""Names of children: legal for the longest legal job, and the same for the same job."""

from __future__ import annotations

import re

import pytest

from finetune_api import naming, rules
from finetune_api.fields import DNS_LABEL

UID = "9f3c2b1a-0d4e-4f5a-8b6c-7d8e9f0a1b2c"
LONGEST = "a" + "b" * 46


def test_the_longest_legal_job_gives_legal_child_names() -> None:
    assert re.fullmatch(rules.NAME_PATTERN, LONGEST)
    names = (
        naming.attempt_name(LONGEST, UID, 9999),
        naming.preflight_name(LONGEST, UID, 99999),
        naming.plan_name(LONGEST, UID),
    )
    for name in names:
        assert len(name) <= 63 and re.fullmatch(DNS_LABEL, name), name
    # An indexed Job puts "-<index>" behind its name to make the pod's host name, which is a DNS label too.
    assert len(f"{names[0]}-255") <= 63


@pytest.mark.parametrize("name", ["1abc", "a.b", "Abc", "a-", "-a", "a" * 48, "", "a_b"])
def test_names_that_would_break_children_are_refused(name: str) -> None:
    assert re.fullmatch(rules.NAME_PATTERN, name) is None


def test_children_of_two_jobs_of_one_name_differ() -> None:
    other = "1" + UID[1:]
    assert naming.attempt_name("faq", UID, 1) == "faq-9f3c2-1"
    assert naming.attempt_name("faq", other, 1) == "faq-1f3c2-1"
    assert naming.preflight_name("faq", UID, 3) == "faq-9f3c2-p3"
    assert naming.plan_name("faq", UID) == "faq-9f3c2-plan"


def test_a_credentials_profile_becomes_an_environment_variable() -> None:
    assert naming.credential_env("p0", "AWS_ACCESS_KEY_ID") == "FINETUNE_CRED_P0_AWS_ACCESS_KEY_ID"
    assert naming.credential_env("team-a", "HF_TOKEN") == "FINETUNE_CRED_TEAM_A_HF_TOKEN"

"""URIs: what is understood, and what is refused with the field and the expected form."""

from __future__ import annotations

import pytest

from finetune_api.failures import FinetuneError
from finetune_api.uri import Uri, parse_uri


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://team-a/faq/train.jsonl", Uri("s3", "team-a", "faq/train.jsonl")),
        ("s3://team-a", Uri("s3", "team-a", "")),
        ("s3://team-a/faq/", Uri("s3", "team-a", "faq")),
        ("pvc://models/falcon", Uri("pvc", "models", "falcon")),
        ("hf://tiiuae/falcon-7b", Uri("hf", "tiiuae/falcon-7b", "")),
        ("hf://tiiuae/falcon-7b/sub/folder", Uri("hf", "tiiuae/falcon-7b", "sub/folder")),
        ("hf://datasets/owner/name", Uri("hf", "owner/name", "", dataset=True)),
        ("hf://datasets/owner/name/train.csv", Uri("hf", "owner/name", "train.csv", dataset=True)),
        ("file:///data/train.jsonl", Uri("file", "", "/data/train.jsonl")),
    ],
)
def test_a_uri_is_understood_and_written_back(text: str, expected: Uri) -> None:
    parsed = parse_uri(text, field="model.uri")
    assert parsed == expected
    assert parse_uri(str(parsed), field="model.uri") == parsed
    assert str(parsed) == text.rstrip("/")


@pytest.mark.parametrize(
    ("text", "must"),
    [
        ("team-a/train.jsonl", "begin with hf://, s3://, pvc:// or file://"),
        ("https://example.com/x", "begin with hf://, s3://, pvc:// or file://"),
        ("S3://team-a/x", "begin with hf://, s3://, pvc:// or file://"),
        ("s3://", "be s3://bucket/path"),
        ("pvc:///x", "be pvc://claim/path"),
        ("pvc://Team_A/x", "name the claim in lower-case letters, digits, '-' and '.'"),
        ("hf://falcon-7b", "be hf://owner/name"),
        ("hf://datasets/owner", "be hf://owner/name or hf://datasets/owner/name"),
        ("file://data/train.jsonl", "be file:///absolute/path"),
        ("pvc://models/../other", "hold no '..'"),
        ("s3://team-a/../team-b/x", "hold no '..'"),
    ],
)
def test_a_malformed_uri_is_refused_with_its_field(text: str, must: str) -> None:
    with pytest.raises(FinetuneError) as caught:
        parse_uri(text, field="dataset.sources[1].uri")
    assert caught.value.failure_class == "InvalidSpec"
    assert caught.value.field == "spec.dataset.sources[1].uri"
    assert str(caught.value).startswith(f"dataset.sources[1].uri is {text!r}; it must ")
    assert must in str(caught.value)


def test_a_child_stands_below_its_parent() -> None:
    assert str(parse_uri("s3://team-a", field="x").child("report.md")) == "s3://team-a/report.md"
    assert str(parse_uri("s3://team-a/faq", field="x").child("report.md")) == "s3://team-a/faq/report.md"
    assert str(parse_uri("file:///out", field="x").child("report.md")) == "file:///out/report.md"

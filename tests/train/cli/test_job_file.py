"""A wrong job file gets an answer with file, line, field and what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_api import rules
from finetune_trainer.cli import cel
from finetune_trainer.cli.jobfile import JobFileError, line_of, read_job_file

GOOD = """\
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: faq, namespace: team-a}
spec:
  model: {uri: file:///models/tiny}
  dataset:
    sources:
    - {uri: file:///data/train.jsonl}
  tuning: {type: LoRA}
  output: {uri: file:///out/faq}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return path


def test_a_good_file_is_read(tmp_path) -> None:
    secret = "---\napiVersion: v1\nkind: Secret\nmetadata: {name: keys}\n"
    job = read_job_file(write(tmp_path, GOOD + secret))
    assert (job.name, job.namespace, job.spec.tuning.type, job.others) == ("faq", "team-a", "LoRA", ("Secret",))


@pytest.mark.parametrize(
    ("before", "after", "line", "words"),
    [
        ("  tuning: {type: LoRA}", "  tunning: {type: LoRA}", 9, "spec.tunning: unknown field; did you mean tuning?"),
        ("  tuning: {type: LoRA}", "  tuning: {type: Lora}", 9, "spec.tuning.type: is 'Lora'; input should be 'Full'"),
        ("  tuning: {type: LoRA}\n", "", 4, "spec.tuning: tuning: is missing; choose tuning.type"),
        (
            "{uri: file:///data/train.jsonl}",
            "{url: file:///data}",
            8,
            "spec.dataset.sources[0].url: unknown field; did you",
        ),
        ("  output: {uri: file:///out/faq}", "  output: {uri: hf://me/out}", 10, "spec.output.uri: is 'hf://me/out'"),
        (
            "  output:",
            "  hyperparameters: {learningRate: fast}\n  output:",
            10,
            "learningRate: is 'fast'; input should be a",
        ),
        ("  output:", "  hyperparameters: {epochs: 1, maxSteps: 2}\n  output:", 10, "set epochs or maxSteps, not both"),
        (
            "{type: LoRA}",
            "{type: Full, lora: {rank: 4}}",
            9,
            "spec.tuning.lora: lora belongs to type LoRA or QLoRA only",
        ),
        ("name: faq,", "name: FAQ,", 3, "metadata.name must start with a lower-case letter"),
        ("v1alpha1", "v1", 1, "apiVersion: is 'finetune.dev/v1'; write finetune.dev/v1alpha1"),
        ("  tuning: {type: LoRA}", "  tuning: {type: LoRA}\n  tuning: {type: Full}", 10, "'tuning' stands twice"),
        ("  model: {uri: file:///models/tiny}", "  model: {uri: file:///m", 6, "this is not YAML"),
        ("kind: FineTuneJob", "kind: Job", 1, "one FineTuneJob is needed, the file has 0 (it holds: Job)"),
    ],
)
def test_a_fault_is_told_with_its_line(tmp_path, before, after, line, words) -> None:
    assert before in GOOD
    path = write(tmp_path, GOOD.replace(before, after, 1))
    with pytest.raises(JobFileError) as refused:
        read_job_file(path)
    told = str(refused.value).splitlines()
    assert any(one.startswith(f"{path}:{line}: ") and words in one for one in told), told
    assert refused.value.row.exit_code == 64


def test_all_faults_are_told_at_once_in_the_order_of_the_file(tmp_path) -> None:
    text = GOOD.replace("{type: LoRA}", "{type: Lora}").replace("tiny}", "tiny, tsk: CausalLM}")
    with pytest.raises(JobFileError) as refused:
        read_job_file(write(tmp_path, text))
    assert [fault.field for fault in refused.value.faults] == ["spec.model.tsk", "spec.tuning.type"]


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(JobFileError, match=r"no\.yaml:1: cannot read the file: No such file"):
        read_job_file(tmp_path / "no.yaml")


@pytest.mark.parametrize(
    ("field", "line"),
    [("spec.dataset.sources[0].uri", 8), ("spec.tuning", 9), ("spec.tuning.lora.rank", 9), ("spec.resources", 4)],
)
def test_a_field_of_a_later_finding_is_found_in_the_file(tmp_path, field, line) -> None:
    assert line_of(write(tmp_path, GOOD), field) == line


def test_every_rule_of_the_schema_is_understood() -> None:
    """The rules on an object alone; those that compare with the old object have none to compare with here."""
    own = [rule for group in rules.BY_MODEL.values() for rule in group]
    own += [rule for group in rules.ROOT.values() for rule in group if "oldSelf" not in rule["rule"]]
    assert len(own) > 15
    for rule in own:
        assert cel.holds(rule["rule"], {"metadata": {"name": "x"}, "spec": {}}) in (True, False)


@pytest.mark.parametrize(
    ("rule", "value", "expected"),
    [
        ("has(self.a) != has(self.b)", {"a": 1}, True),
        ("has(self.a) != has(self.b)", {"a": 1, "b": 0}, False),
        ("!(has(self.a) && has(self.b))", {"a": False, "b": False}, False),
        ("!has(self.a) || self.type in ['X', 'Y']", {"a": {}, "type": "Z"}, False),
        ("!has(self.a) || self.type in ['X', 'Y']", {"type": "Z"}, True),
        ("self.bits == 4 || self.bits == 8", {"bits": 8}, True),
        ("self.n.matches('^[a-z]([-a-z0-9]{0,3})?$')", {"n": "abcdef"}, False),
    ],
)
def test_a_rule_means_what_the_api_server_takes_it_to_mean(rule, value, expected) -> None:
    assert cel.holds(rule, value) is expected


@pytest.mark.parametrize(
    "rule", ["size(self.a) > 3", "self.a &&", "self.a.exists(x, x > 1)", "has(self.a) has(self.b)"]
)
def test_a_rule_outside_the_known_part_is_refused(rule) -> None:
    with pytest.raises(ValueError, match=r"not understood|ends too soon"):
        cel.holds(rule, {"a": "x"})

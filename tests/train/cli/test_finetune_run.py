"""`finetune run` and `finetune plan` as a person uses them. The stand-in trains; one test takes the real worker."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import boto3
import pytest

from tests.train.cli.conftest import ROOT


def adapter(output: Path) -> dict:
    return json.loads((output / "adapter" / "adapter.json").read_text())


def test_a_job_file_runs_to_a_folder_and_says_where_the_result_is(finetune, job, tmp_path) -> None:
    command = finetune("run", "-f", str(job()), "--work", "w", does={"steps": 4, "load_seconds": 4})
    assert command.execute() == 0, command.out + command.err
    assert adapter(tmp_path / "out") == {"step": 4, "resumedFrom": None}
    assert f"Artifact: {tmp_path}/out/adapter" in command.out
    assert "40 records" in command.out
    assert "hyperparameters.learningRate" in command.out and "checkpoint.keepLast" not in command.out
    assert re.search(r"\d+ more settings and their reasons: finetune plan, or the report", command.out)
    assert [word for word in ("3.5000", "2.5000", "-28.6%") if word not in command.out] == []
    assert "Loading 0/" in command.out  # plain lines where there is no terminal


def test_the_output_folder_of_the_command_line_wins_and_cluster_settings_are_named(finetune, job, tmp_path) -> None:
    path = job(
        "  deadlineSeconds: 60\n  credentials: {secretName: keys}\n  resources: {pool: a100-80}\n",
        output="s3://team-a/faq",
    )
    command = finetune("run", "-f", str(path), "--output-dir", "my results", "--work", "w", does={"steps": 2})
    assert command.execute() == 0, command.out + command.err
    assert adapter(tmp_path / "my results")["step"] == 2
    assert "deadlineSeconds counts in a cluster only" in command.out
    assert "resources.pool: a100-80 counts in a cluster only" in command.out
    assert "credentials name objects of a cluster" in command.out


def test_ctrl_c_saves_and_the_same_command_goes_on(finetune, job, tmp_path) -> None:
    path = job()
    first = finetune("run", "-f", str(path), "--work", "w", does={"steps": 10_000, "save_every": 1_000_000}).start()
    first.wait_for_step(tmp_path / "w", 3)
    first.press_ctrl_c()
    assert first.finish() == 100
    assert "Run the same command again to go on." in first.out
    saved = int(next((tmp_path / "out" / "checkpoints" / "fence-1").iterdir()).name.removeprefix("step-"))
    again = finetune("run", "-f", str(path), "--work", "w", does={"steps": saved + 2})
    assert again.execute() == 0, again.out + again.err
    assert adapter(tmp_path / "out") == {"step": saved + 2, "resumedFrom": saved}
    assert (tmp_path / "w" / "log").read_text().count("inputs fetched") == 1  # a large model is not downloaded again


def test_changed_data_is_a_new_run_that_needs_a_new_output(finetune, job, tmp_path) -> None:
    path = job()
    assert finetune("run", "-f", str(path), "--work", "w", does={"steps": 2}).execute() == 0
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"prompt": "What is 99 plus 1?", "completion": " 100"}\n')
    again = finetune("run", "-f", str(path), "--work", "w", does={"steps": 2})
    assert again.execute() == 71
    assert "OutputInUse" in again.out
    moved = finetune("run", "-f", str(path), "--work", "w", "--output-dir", "second", does={"steps": 2})
    assert moved.execute() == 0
    assert (tmp_path / "w" / "log").read_text().count("inputs fetched") == 2


def test_a_second_ctrl_c_ends_at_once_and_leaves_no_process(finetune, job, tmp_path) -> None:
    command = finetune("run", "-f", str(job()), "--work", "w", does={"steps": 10_000, "deaf": True}).start()
    command.wait_for_step(tmp_path / "w", 1)
    command.press_ctrl_c()
    time.sleep(1)
    command.press_ctrl_c()
    assert command.finish() == 101
    deadline = time.monotonic() + 20
    while alive := _with_argument(str(tmp_path / "w")):
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)


def test_a_killed_command_leaves_a_checkpoint(finetune, job, tmp_path) -> None:
    command = finetune("run", "-f", str(job()), "--work", "w", does={"steps": 10_000, "save_every": 1_000_000}).start()
    command.wait_for_step(tmp_path / "w", 2)
    command.process.kill()
    command.process.communicate()
    deadline = time.monotonic() + 30
    while not list((tmp_path / "out").glob("checkpoints/fence-1/step-*/MANIFEST.json")):
        assert time.monotonic() < deadline, "the agent did not save when its command was killed"
        time.sleep(0.1)


def test_the_same_job_does_not_run_twice_at_once(finetune, job, tmp_path) -> None:
    (tmp_path / "w").mkdir()
    with (tmp_path / "w" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = finetune("run", "-f", str(job()), "--work", "w")
        assert command.execute() == 71
    assert "runs already in" in command.err


def test_a_failure_of_the_run_is_explained(finetune, job) -> None:
    command = finetune("run", "-f", str(job()), "--work", "w", does={"fail_rank": 0, "fail_how": "class:NonFiniteLoss"})
    assert command.execute() == 83
    assert "NonFiniteLoss: rank 0 met NonFiniteLoss" in command.out
    assert "Lower hyperparameters.learningRate" in command.out


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        ({"data": "file:///no/such/train.jsonl"}, 66, ["DataNotFound", "spec.dataset.sources[0].uri", "job.yaml:8"]),
        ({"model": "file:///no/such/model"}, 67, ["ModelNotFound", "spec.model.uri", "job.yaml:5"]),
    ],
)
def test_preflight_stops_a_run_that_cannot_work(finetune, job, settings, code, words) -> None:
    command = finetune("run", "-f", str(job(**settings)), "--work", "w")
    assert command.execute() == code
    assert [word for word in words if word not in command.out] == []


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            "  queueName: gpus\n  checkpoints: {}\n",
            ["job.yaml:15: spec.checkpoints: unknown field", "mean checkpoint?"],
        ),
        ("  dataset2: {}\n", ["job.yaml:14: spec.dataset2: unknown field"]),
    ],
)
def test_a_wrong_field_is_told_with_file_and_line(finetune, job, more, words) -> None:
    command = finetune("run", "-f", str(job(more)), "--work", "w")
    assert command.execute() == 64
    assert [word for word in words if word not in command.err] == []


def test_a_value_that_this_release_cannot_honour_is_refused_with_its_line(finetune, job) -> None:
    command = finetune("plan", "-f", str(job("  evaluation: {metrics: [rouge]}\n")))
    assert command.execute() == 64
    assert "UnsupportedField" in command.err
    assert "job.yaml:14" in command.err


def test_plan_shows_values_with_reasons_and_starts_nothing(finetune, job, tmp_path) -> None:
    command = finetune("plan", "-f", str(job()))
    assert command.execute() == 0, command.out + command.err
    assert [
        word
        for word in (
            "hyperparameters.learningRate",
            "set by the job",
            "decays to zero at the end",
            "cpu",
            "checkpoint.keepLast",
        )
        if word not in command.out
    ] == []
    assert "more settings" not in command.out
    assert not (tmp_path / "out" / "fences").exists()


def test_an_offline_plan_says_what_it_left_out(finetune, job) -> None:
    here = finetune("plan", "-f", str(job(output="s3://team-a/faq")), "--offline")
    assert here.execute() == 0, here.out + here.err
    assert "hyperparameters.learningRate" in here.out
    assert "offline: s3://team-a/faq was not tried" in here.out
    there = finetune("plan", "-f", str(job(model="hf://tiiuae/falcon-7b")), "--offline")
    assert there.execute() == 0
    assert "offline: hf://tiiuae/falcon-7b was not looked at" in there.out
    assert "there is no plan" in there.out


def test_a_terminal_gets_a_bar(job, tmp_path) -> None:
    path = job()
    terminal, own = pty.openpty()
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "TERM": "xterm",
        "COLUMNS": "120",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'api'}:{ROOT / 'trainer-image'}",
        "STAND_IN": '{"steps": 8, "step_seconds": 0.3}',
    }
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "finetune_trainer.cli",
            "run",
            "-f",
            str(path),
            "--work",
            str(tmp_path / "w"),
            "--worker-module",
            "tests.train.agent.stand_in",
        ],
        stdout=own,
        stderr=own,
        env=environment,
        cwd=tmp_path,
    )
    os.close(own)
    seen = b""
    while chunk := _read(terminal):
        seen += chunk
    assert process.wait(60) == 0, seen.decode()
    text = seen.decode()
    assert "Training" in text and "━" in text and "1,234 tokens/s" in text and "ETA" in text


def test_the_real_worker_stopped_by_ctrl_c_goes_on_in_s3(finetune, job, tmp_path, s3) -> None:
    path = job(output="s3://team-a/models/sums", steps=150)
    keys = s3.environment("team-a")
    first = finetune("run", "-f", str(path), "--work", "w", does=None, environment=keys).start()
    first.wait_for_step(tmp_path / "w", 2)
    first.press_ctrl_c()
    assert first.finish() == 100, first.out + first.err
    stored = s3.data / "team-a" / "models" / "sums"
    (checkpoint,) = (stored / "checkpoints" / "fence-1").glob("step-*")
    again = finetune("run", "-f", str(path), "--work", "w", does=None, environment=keys)
    assert again.execute() == 0, again.out + again.err + (tmp_path / "w" / "log").read_text()
    assert f"resumed_from_step={checkpoint.name.removeprefix('step-')}" in (tmp_path / "w" / "log").read_text()
    client = boto3.client("s3", **s3.client_options("team-a"))
    config = client.get_object(Bucket="team-a", Key="models/sums/adapter/adapter_config.json")["Body"].read()
    assert json.loads(config)["peft_type"] == "LORA"
    assert "Artifact: s3://team-a/models/sums/adapter" in again.out
    assert keys["AWS_SECRET_ACCESS_KEY"] not in again.out + (tmp_path / "w" / "log").read_text()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # the last writer has closed it
        return b""


def _with_argument(argument: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if any(argument.encode() in word for word in words) and b"finetune_trainer.cli" not in words:
            found.append(b" ".join(words).decode())
    return found

"""No secret reaches a worker, the log, the progress or the termination message; the message fits its limit."""

from __future__ import annotations

import json

from finetune_api.documents import TERMINATION_BYTES
from finetune_trainer.agent.ending import End, termination_message
from finetune_trainer.agent.redaction import Redactor, without_secrets

SECRET = "s3cr3t/of+the+team=="
TOKEN = "hf_AbCdEfGhIjKlMnOp"
ENVIRONMENT = {
    "FINETUNE_CRED_P0_AWS_ACCESS_KEY_ID": "team-a",
    "FINETUNE_CRED_P0_AWS_SECRET_ACCESS_KEY": SECRET,
    "FINETUNE_CRED_P0_HF_TOKEN": TOKEN,
    "AWS_ACCESS_KEY_ID": "team-a",
    "AWS_SECRET_ACCESS_KEY": "another-secret-key",
    "AWS_SESSION_TOKEN": "session-token-value",
    "AWS_ENDPOINT_URL": "http://s3.example",
    "HF_TOKEN": "hf_of_the_environment",
}


def test_a_worker_sees_its_place_and_no_secret(make_agent, make_run, tmp_path) -> None:
    told = tmp_path / "environment.json"
    agent = make_agent(
        make_run(processes=2),
        does={"steps": 1, "environment_to": str(told)},
        environment={**ENVIRONMENT, "NCCL_DEBUG": "WARN", "OMP_NUM_THREADS": "3"},
    )
    assert agent.execute() == 0
    seen = json.loads(told.read_text())
    assert [name for name in seen if name.startswith(("FINETUNE_CRED_", "AWS_", "HF_TOKEN"))] == []
    assert not set(ENVIRONMENT.values()) & set(seen.values())
    assert seen["NCCL_DEBUG"] == "WARN"
    assert seen["OMP_NUM_THREADS"] == "3"
    assert (seen["WORLD_SIZE"], seen["LOCAL_WORLD_SIZE"], seen["MASTER_ADDR"]) == ("2", "2", "127.0.0.1")
    assert seen["RANK"] == seen["LOCAL_RANK"]
    assert (seen["TORCH_FORCE_WEIGHTS_ONLY_LOAD"], seen["HF_HUB_OFFLINE"]) == ("1", "1")


def test_a_secret_in_a_workers_last_words_is_masked_everywhere(make_agent) -> None:
    words = f"cannot log in with {SECRET} and {TOKEN}"
    agent = make_agent(does={"fail_rank": 0, "last_words": words}, environment=ENVIRONMENT)
    assert agent.execute() == 65
    assert "cannot log in with *** and ***" in agent.message.message
    assert SECRET not in agent.out and TOKEN not in agent.out


def test_a_message_of_any_length_fits_the_termination_log(make_agent) -> None:
    agent = make_agent(does={"fail_rank": 0, "last_words": 'ü€𝄞"\\' * 3000})
    assert agent.execute() == 65
    assert len(agent.message_bytes) <= TERMINATION_BYTES
    assert agent.message.message.startswith("rank 0 met DataInvalid")


def test_long_fields_are_cut_not_refused() -> None:
    data = termination_message(End("DataInvalid", "x" * 100_000, "spec." + "y" * 1000), Redactor({}), step=3)
    found = json.loads(data)
    assert len(data) <= TERMINATION_BYTES
    assert len(found["field"]) == 256
    assert found["message"].endswith("…")


def test_a_secret_that_holds_another_leaves_no_rest() -> None:
    redactor = Redactor({"HF_TOKEN": "abcdefgh", "AWS_SECRET_ACCESS_KEY": "abcdefgh-ijkl"})
    assert redactor.text("abcdefgh-ijkl abcdefgh") == "*** ***"


def test_an_access_key_id_is_a_name_and_stays_readable() -> None:
    assert Redactor(ENVIRONMENT).text("s3://team-a/models") == "s3://team-a/models"


def test_ordinary_variables_stay() -> None:
    kept = without_secrets({**ENVIRONMENT, "PATH": "/bin", "TOKENIZERS_PARALLELISM": "false"})
    assert kept == {"PATH": "/bin", "TOKENIZERS_PARALLELISM": "false"}

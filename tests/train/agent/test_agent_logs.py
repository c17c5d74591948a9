"""After a failure the end of each rank's log is in the output, bounded and without secrets."""

from __future__ import annotations

from finetune_trainer.agent.gang import LOG_BYTES
from finetune_trainer.agent.output import Tail

SECRET = "a-secret-of-the-team"


def test_the_logs_of_a_failure_are_kept_without_secrets_and_their_address_is_told(make_agent, output) -> None:
    does = {"steps": 10, "fail_rank": 0, "fail_step": 3, "fail_how": "code:1", "say": f"{SECRET} and more"}
    agent = make_agent(does=does, attempt=2, environment={"HF_TOKEN": SECRET})
    assert agent.execute() == 101
    kept = (output / "logs" / "attempt-2" / "rank-0.log").read_text()
    assert "*** and more" in kept and "step 2" in kept
    assert SECRET not in kept
    assert "logs/attempt-2/." in agent.message.message


def test_the_address_is_told_also_where_the_message_is_long(make_agent) -> None:
    agent = make_agent(does={"fail_rank": 0, "last_words": "x" * 5000})
    assert agent.execute() == 65
    assert agent.message.message.startswith("rank 0 met DataInvalid")
    assert "logs/attempt-0/." in agent.message.message


def test_a_stop_leaves_no_logs_in_the_output(make_agent, output) -> None:
    agent = make_agent(does={"steps": 10_000}).start()
    agent.wait_for_step(1)
    assert agent.stop() == 100
    assert not (output / "logs").exists()


def test_the_end_of_a_long_log_is_what_stays() -> None:
    tail = Tail(LOG_BYTES)
    for number in range(20_000):
        tail.add(f"line {number}\n".encode())
    lines = tail.text().splitlines()
    assert lines[-1] == "line 19999"
    assert lines[0] == f"line {20_000 - len(lines)}"
    assert LOG_BYTES - 20 < len(tail.text()) <= LOG_BYTES

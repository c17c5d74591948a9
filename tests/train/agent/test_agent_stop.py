"""SIGTERM at any moment: a checkpoint where there is something to save, a quick end where there is not."""

from __future__ import annotations

import json
import signal
import socket
import time

from tests.train.agent.test_agent_success import steps_in


def test_a_stop_saves_stores_and_exits_with_100(make_agent, output) -> None:
    agent = make_agent(does={"steps": 10_000, "save_every": 1_000_000}).start()
    agent.wait_for_step(3)
    assert agent.stop() == 100
    assert agent.message.outcome == "Stopped"
    stored = agent.message.checkpoint_step
    assert stored is not None and stored >= 3
    assert steps_in(output) == [stored]
    assert f"The checkpoint of step {stored} is stored." in agent.message.message


def test_ctrl_c_is_a_stop_too(make_agent) -> None:
    agent = make_agent(does={"steps": 10_000}).start()
    agent.wait_for_step(1)
    agent.process.send_signal(signal.SIGINT)
    assert agent.finish() == 100
    assert agent.message.outcome == "Stopped"


def test_the_next_attempt_goes_on_from_the_checkpoint(make_agent, output) -> None:
    first = make_agent(does={"steps": 10_000, "save_every": 1_000_000}).start()
    first.wait_for_step(2)
    assert first.stop() == 100
    step = first.message.checkpoint_step
    second = make_agent(does={"steps": step + 2}, attempt=1)
    assert second.execute() == 0
    assert second.events("attempt begun")[0]["resumed_from_step"] == step
    assert json.loads((output / "adapter" / "adapter.json").read_text()) == {"step": step + 2, "resumedFrom": step}


def test_workers_that_do_not_stop_are_killed_and_the_newest_checkpoint_is_stored(make_agent, output) -> None:
    agent = make_agent(
        does={"steps": 10_000, "save_every": 3, "deaf": True, "step_seconds": 0.1},
        arguments=("--stop-budget", "2"),
    ).start()
    agent.wait_for_step(4)
    assert agent.stop() == 100
    assert agent.message.outcome == "Stopped"
    assert "were killed" in agent.message.message
    assert agent.message.checkpoint_step == steps_in(output)[0] >= 3


def test_a_stop_while_workers_load_ends_with_stopped(make_agent, output) -> None:
    agent = make_agent(does={"load_seconds": 600}, arguments=("--stop-budget", "1")).start()
    agent.wait_for_event("workers started")
    assert agent.stop() == 100
    assert agent.message.outcome == "Stopped"
    assert steps_in(output) == []


def test_a_stop_while_inputs_are_fetched_ends_at_once(make_agent, make_run) -> None:
    """The storage accepts the connection and never answers, as one behind a broken network does."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        run = make_run()
        source = run.dataset.sources[0].model_copy(
            update={
                "uri": "s3://team-a/train.jsonl",
                "access": run.dataset.sources[0].access.model_copy(update={"endpoint": endpoint}),
            }
        )
        run = run.model_copy(update={"dataset": run.dataset.model_copy(update={"sources": [source]})})
        keys = {"AWS_ACCESS_KEY_ID": "team-a", "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-team"}
        agent = make_agent(run, environment=keys).start()
        agent.wait_for_event("attempt begun")
        silent.accept()
        begun = time.monotonic()
        assert agent.stop() == 100
        assert time.monotonic() - begun < 20  # boto3 alone would go on for minutes
    assert agent.message.outcome == "Stopped"
    assert agent.events("workers started") == []


def test_a_newer_attempt_cuts_an_older_one_off(make_agent, output) -> None:
    old = make_agent(does={"steps": 10_000, "save_every": 2, "step_seconds": 0.1}).start()
    old.wait_for_event("checkpoint stored")
    new = make_agent(does={"steps": 6, "step_seconds": 0.5}, attempt=1).start()
    assert old.finish() == 100
    assert old.message.outcome == "Stopped"
    assert "taken" in old.message.message
    assert new.finish() == 0

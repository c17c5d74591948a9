"""The best step's checkpoint: stored whatever comes after it, kept, and brought back for a later attempt."""

from __future__ import annotations

import json

from tests.train.agent.test_agent_success import steps_in


def test_the_best_checkpoint_stays_in_the_store_beside_the_newest(make_agent, make_run, output) -> None:
    agent = make_agent(make_run(keep_last=1), does={"steps": 8, "save_every": 2, "step_seconds": 0.25, "best_step": 4})
    assert agent.execute() == 0, agent.out + agent.err
    assert steps_in(output) == [8, 4]


def test_the_best_checkpoint_is_not_skipped_when_newer_ones_wait(make_agent, make_run, output) -> None:
    """Steps are made faster than the store is looked at: plain checkpoints are skipped, the best one never."""
    agent = make_agent(make_run(keep_last=1), does={"steps": 9, "save_every": 1, "step_seconds": 0.0, "best_step": 3})
    assert agent.execute() == 0, agent.out + agent.err
    assert steps_in(output) == [9, 3]


def test_a_later_attempt_has_the_best_weights_on_its_disk(make_agent, make_run, output) -> None:
    run = make_run(keep_last=1)
    does = {"steps": 8, "save_every": 2, "step_seconds": 0.25, "best_step": 2}
    first = make_agent(run, does={**does, "fail_rank": 0, "fail_step": 7, "fail_how": "class:Hang"})
    assert first.execute() != 0
    assert steps_in(output) == [6, 2]
    second = make_agent(run, does=does, attempt=1)
    assert second.execute() == 0, second.out + second.err
    assert json.loads((second.work / "resume/step.json").read_text()) == {"step": 6}
    assert json.loads((second.work / "best/step.json").read_text()) == {"step": 2}


def test_an_attempt_whose_best_checkpoint_is_gone_says_so_and_goes_on(make_agent, make_run, output) -> None:
    run = make_run(keep_last=1)
    does = {"steps": 8, "save_every": 2, "step_seconds": 0.25, "best_step": 2}
    first = make_agent(run, does={**does, "fail_rank": 0, "fail_step": 7, "fail_how": "class:Hang"})
    assert first.execute() != 0
    (output / "checkpoints/fence-1/step-2/MANIFEST.json").unlink()
    second = make_agent(run, does=does, attempt=1)
    assert second.execute() == 0, second.out + second.err
    assert second.events("the best checkpoint is not stored")[0]["step"] == 2
    assert json.loads((second.work / "resume/run.json").read_text())["best"] == []
    assert not (second.work / "best").exists()

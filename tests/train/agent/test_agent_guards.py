"""Guards: the agent starts the workers again in the same pod with what has to change, never for ever, and remembers it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_api.guards import GuardState, Rollback, RollbackReason
from finetune_api.job import LossSpikeGuard
from finetune_api.runfile import RunFile, RunGuards
from finetune_trainer.agent.gang import free_port
from finetune_trainer.agent.stopping import settle_limit
from finetune_trainer.store.checkpoints import start_attempt, survey
from finetune_trainer.store.documents import Fence
from finetune_trainer.store.objects import open_store
from tests.train.agent.runs import Agent

GUARDS = RunGuards(loss_spike=LossSpikeGuard.ROLLBACK, rollback_steps=3, lowered_steps=2)
SPIKE = {"steps": 14, "save_every": 2, "step_seconds": 0.3, "spike_step": 9}


@pytest.fixture
def guarded(make_run: Callable[..., RunFile]) -> Callable[..., RunFile]:
    """Runs with micro batch 4, two passes, and the loss guard on."""

    def make(**changes: Any) -> RunFile:
        run = make_run(**changes)
        planned = run.hyperparameters.model_copy(update={"micro_batch_size": 4, "gradient_accumulation": 2})
        return run.model_copy(update={"hyperparameters": planned, "guards": GUARDS})

    return make


def traced(agent: Agent, *names: str) -> list[tuple[Any, ...]]:
    """These fields of each step that the workers made, in order."""
    lines = Path(agent.does["trace_to"]).read_text().splitlines()
    return [tuple(json.loads(line)[name] for name in names) for line in lines]


def fence(output: Path, number: int) -> Fence:
    store, prefix = open_store(str(output))
    return Fence.read(store, f"{prefix}/fences/{number}".lstrip("/"))


def starts(agent: Agent) -> int:
    return len(agent.events("workers started"))


def test_a_spike_is_rolled_back_in_the_same_pod_and_the_rate_is_restored_once_past_it(
    make_agent, guarded, output, tmp_path
) -> None:
    agent = make_agent(guarded(), does={**SPIKE, "spike_factor": 0.5, "trace_to": str(tmp_path / "trace")})
    assert agent.execute() == 0, agent.out + agent.err
    assert traced(agent, "step", "factor") == [
        *((step, 1.0) for step in range(1, 9)),
        *((step, 0.5) for step in range(7, 12)),
        *((step, 1.0) for step in range(12, 15)),
    ]
    rollback = Rollback(reason=RollbackReason.SPIKE, onset_step=9, to_step=6, until_step=11, factor=0.5)
    assert fence(output, 1).guards == GuardState()
    assert fence(output, 2).guards == GuardState(rollbacks=(rollback,))
    assert fence(output, 2).base.step == 6
    (told,) = agent.events("guard")
    assert told["rollbacks"] == [rollback.to_json()]
    assert "Rollback 1 of 5" in told["message"]
    assert starts(agent) == 2
    assert len(agent.events("inputs fetched")) == 1, "inputs stay"
    message = agent.message
    assert (message.outcome, message.step, message.resumed_from_step) == ("Succeeded", 14, 6)
    assert message.spent.redo == pytest.approx(2 * 0.3, abs=0.4), "steps 7 and 8 were made in vain"
    assert json.loads((output / "adapter" / "adapter.json").read_text())["resumedFrom"] == 6


def test_a_spike_before_any_checkpoint_is_a_fresh_start(make_agent, guarded, tmp_path) -> None:
    does = {**SPIKE, "steps": 4, "spike_step": 2, "spike_factor": 0.5, "trace_to": str(tmp_path / "trace")}
    agent = make_agent(guarded(), does=does)
    assert agent.execute() == 0, agent.out + agent.err
    assert traced(agent, "step", "factor") == [(1, 1.0), (1, 0.5), (2, 0.5), (3, 0.5), (4, 0.5)]
    assert agent.message.resumed_from_step is None


def test_five_rollbacks_are_all_and_a_further_attempt_does_not_begin_to_count_anew(make_agent, guarded, output) -> None:
    does = {**SPIKE, "step_seconds": 0.05, "spike_step": 3, "spike_class": "NonFiniteLoss"}
    agent = make_agent(guarded(), does=does)
    assert agent.execute() == 83
    assert starts(agent) == 6
    assert agent.message.outcome == "NonFiniteLoss"
    assert "The run had gone back 5 times" in agent.message.message
    assert [found.factor for found in fence(output, 6).guards.rollbacks] == [0.5**k for k in range(1, 6)]
    again = make_agent(guarded(), attempt=1, does=does)
    assert again.execute() == 83
    assert starts(again) == 1


def test_with_the_guard_off_a_spike_is_the_end(make_agent, make_run) -> None:
    agent = make_agent(make_run(), does={**SPIKE, "spike_step": 2})
    assert agent.execute() == 91
    assert starts(agent) == 1


def test_out_of_gpu_memory_halves_the_micro_batch_until_it_fits_and_later_attempts_remember_it(
    make_agent, guarded, output, tmp_path
) -> None:
    does = {"steps": 10_000, "most_records": 1, "trace_to": str(tmp_path / "trace")}
    first = make_agent(guarded(), does=does).start()
    first.wait_for_step(3)
    assert first.stop() == 100
    assert starts(first) == 3
    assert set(traced(first, "records", "passes")) == {(1, 8)}, "as many records in each step as planned"
    assert [event["microBatchDivisor"] for event in first.events("guard")] == [2, 4]

    second = make_agent(guarded(), attempt=1, does={**does, "steps": first.message.checkpoint_step + 2})
    assert second.execute() == 0
    assert starts(second) == 1
    assert fence(output, 4).guards.micro_batch_divisor == 4


def test_out_of_gpu_memory_loses_no_step_that_has_a_checkpoint(make_agent, guarded, tmp_path) -> None:
    """What is complete on the local disk is stored before the workers start again."""
    does = {"steps": 6, "save_every": 2, "step_seconds": 0.02, "trace_to": str(tmp_path / "trace")}
    agent = make_agent(guarded(), does={**does, "most_records": 2, "memory_step": 5})
    assert agent.execute() == 0, agent.out + agent.err
    assert traced(agent, "step", "records") == [(1, 4), (2, 4), (3, 4), (4, 4), (5, 2), (6, 2)]


def test_out_of_gpu_memory_at_one_record_stands_with_a_hint(make_agent, guarded) -> None:
    agent = make_agent(guarded(), does={"most_records": 0})
    assert agent.execute() == 80
    assert starts(agent) == 3
    assert "The micro batch is 1 already" in agent.message.message
    assert agent.message.field == "spec.hyperparameters.maxSequenceLength"


def test_a_stop_about_the_time_of_a_change_is_a_stop_and_the_change_is_made_once(make_agent, guarded, output) -> None:
    does = {"steps": 40, "step_seconds": 0.1, "save_every": 4, "deaf": True, "spike_step": 20, "spike_factor": 0.5}
    first = make_agent(guarded(), does=does).start()
    first.wait_for_step(12)
    assert first.stop() == 100, "the spike came within the stop's budget, from workers that did not stop"
    assert first.message.outcome == "Stopped"
    second = make_agent(guarded(), attempt=1, does=does)
    assert second.execute() == 0, second.out
    newest = survey(*open_store(str(output))).record
    assert [found.onset_step for found in newest.guards.rollbacks] == [20], "by one attempt or by the other"


def start_gang(
    make_agent, run: RunFile, attempt: int, folder: Path, does: dict[str, Any], budgets: tuple[int, int] = (4, 4)
) -> list[Agent]:
    """Both nodes of an attempt, with these stop budgets in seconds. Their ranks keep in step, and meet in folder."""
    folder.mkdir()
    port, does = str(free_port()), {**does, "meeting": str(folder), "trace_to": str(folder / "trace")}
    common = ("--master-port", str(free_port()), "--master-progress-port", port)
    places = ((0, (*common, "--port", port)), (1, common))
    return [
        make_agent(
            run, attempt=attempt, node=node, does=does, arguments=(*arguments, "--stop-budget", str(budgets[node]))
        ).start()
        for node, arguments in places
    ]


def finish_gang(make_agent, run: RunFile, attempt: int, folder: Path, does: dict[str, Any]) -> list[Agent]:
    """Both nodes of an attempt, after their end."""
    nodes = start_gang(make_agent, run, attempt, folder, does)
    for node in nodes:
        node.finish()
    return nodes


@pytest.mark.parametrize(
    ("does", "told", "guards"),
    [
        ({"spike_step": 5, "spike_factor": 0.5}, "Rollback 1 of 5", (1, 1)),
        ({"most_records": 2, "fail_rank": 1, "fail_step": -1}, "ran out of memory with micro batch 4: now 2", (2, 0)),
    ],
    ids=["a spike, which all see", "memory, which node 1 alone ran out of"],
)
def test_of_several_nodes_node_0_keeps_the_decision_and_the_next_attempt_takes_it_over(
    make_agent, guarded, output, tmp_path, does, told, guards
) -> None:
    run = guarded(nodes=2)
    first = finish_gang(make_agent, run, 0, tmp_path / "first", {**does, "steps": 8})
    assert [node.message.outcome for node in first] == ["RolledBack", "CollectiveFailed"], first[0].out + first[1].out
    assert [node.process.returncode for node in first] == [102, 85]
    assert told in first[0].message.message
    assert [starts(node) for node in first] == [1, 1]
    assert len(first[0].events("attempt begun")) == 1, "nothing is restored for workers that do not start"
    second = finish_gang(make_agent, run, 1, tmp_path / "second", {**does, "steps": 8})
    assert [node.process.returncode for node in second] == [0, 0], second[0].out + second[1].out
    kept = fence(output, 3).guards
    assert (kept.micro_batch_divisor, len(kept.rollbacks)) == guards
    assert traced(second[0], "factor", "records")[0] == (0.5 if kept.rollbacks else 1.0, 4 // kept.micro_batch_divisor)


SHORT_OF_MEMORY = {"steps": 8, "most_records": 2, "fail_rank": 1, "fail_step": -1}


@pytest.mark.parametrize(
    ("does", "waited"),
    [({"unseen": True}, False), ({"saveless_rank": 1, "memory_step": 5}, True)],
    ids=["workers of node 0 that still wait for node 1", "node 0 waiting for node 1's part of a checkpoint"],
)
def test_node_0_keeps_its_decision_although_it_is_ended_as_soon_as_node_1_has_left(
    make_agent, guarded, output, tmp_path, does, waited
) -> None:
    """As Kubernetes does it: the first failed pod fails the Job, which ends the others."""
    run = guarded(nodes=2)
    # A file in the place of a folder: the storage takes nothing of node 1, not even that its part does not come.
    for folder in (output / "checkpoints/fence-1/step-2", output / "checkpoints/fence-1/step-4"):
        folder.mkdir(parents=True)
        (folder / "nodes").touch()
    first = start_gang(make_agent, run, 0, tmp_path / "first", {**SHORT_OF_MEMORY, **does}, budgets=(10, 1))
    assert first[1].finish() == 85, first[1].out
    assert first[1].events("left early"), "node 1 gave node 0 all the time that it had"
    assert first[0].stop() == 102, first[0].out
    assert bool(first[0].events("left early")) is waited
    assert first[0].message.outcome == "RolledBack"
    assert "ran out of memory with micro batch 4: now 2" in first[0].message.message
    assert len(first[0].events("attempt begun")) == 1, "nothing is restored for workers that do not start"
    second = finish_gang(make_agent, run, 1, tmp_path / "second", SHORT_OF_MEMORY)
    assert [node.process.returncode for node in second] == [0, 0], second[0].out + second[1].out
    assert fence(output, 3).guards.micro_batch_divisor == 2
    assert traced(second[0], "step", "records")[0] == (1, 2)


def test_a_checkpoint_that_node_1_ended_without_does_not_hold_up_the_decision(
    make_agent, guarded, output, tmp_path
) -> None:
    does = {**SHORT_OF_MEMORY, "saveless_rank": 1, "memory_step": 5}
    nodes = start_gang(make_agent, guarded(nodes=2), 0, tmp_path / "gang", does, budgets=(10, 10))
    assert [node.finish() for node in nodes] == [102, 85], nodes[0].out + nodes[1].out
    missing = nodes[0].events("a node's part is missing")
    assert missing and "the workers of this node ended before they had made it" in missing[0]["error"]
    assert nodes[0].events("left early") == []
    assert fence(output, 2).guards.micro_batch_divisor == 2


@pytest.mark.parametrize(
    ("begun", "stop", "limit"),
    [
        (100.0, None, 108.0),
        (100.0, 103.0, 111.0),
        (103.0, 100.0, 108.0),
        (109.0, 100.0, 109.5),
        (112.0, 100.0, 111.0),
    ],
    ids=["no stop", "a stop meanwhile", "soon after a stop", "workers killed late", "nothing left"],
)
def test_the_last_checkpoint_has_a_part_of_the_stop_budget_also_where_the_workers_end_late(begun, stop, limit) -> None:
    assert settle_limit(begun, stop, budget=10.0) == limit


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_guard_of_an_attempt_that_was_cut_off_changes_nothing_for_the_job_that_took_over(
    make_agent, guarded, output, tmp_path, nodes
) -> None:
    does = {"steps": 12, "save_every": 100, "step_seconds": 0.2, "most_records": 2, "memory_step": 10}
    if nodes == 1:
        agents = [make_agent(guarded(), does=does).start()]
    else:
        agents = start_gang(make_agent, guarded(nodes=2), 0, tmp_path / "gang", does)
    agents[0].wait_for_step(2)
    store, prefix = open_store(str(output))
    start_attempt(store, prefix, job_uid="another", attempt=0, restore_to=None)
    assert agents[0].finish() == 100, agents[0].out
    for node in agents[1:]:
        node.finish()
    assert "fence 2 has taken" in agents[0].message.message
    assert len(agents[0].events("guard")) == 1, "it did run out of memory"
    newest = survey(store, prefix)
    assert newest.record is not None and (newest.fence, newest.record.job_uid) == (2, "another")
    assert newest.record.guards == GuardState()

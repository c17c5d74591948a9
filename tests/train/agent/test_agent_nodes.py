"""A gang of several nodes: each stores its own ranks' files, node 0 commits all of them, and every node goes on."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from finetune_api.runfile import RunFile
from finetune_trainer.agent.gang import free_port
from tests.chaos import journal
from tests.chaos.zygote import SOCKET_VARIABLE, Zygote
from tests.train.agent.runs import Agent, run_file
from tests.train.agent.test_agent_success import steps_in
from tests.train.models import tiny_model

StartGang = Callable[..., list[Agent]]


@pytest.fixture
def start_gang(make_agent, tmp_path) -> StartGang:
    """Starts one agent for each of two nodes on this host. Stand-ins keep in step, as real workers do."""
    count = iter(range(10))

    def start(
        run: RunFile,
        *further: str,
        does: dict[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> list[Agent]:
        master, port = str(free_port()), str(free_port())
        meeting = tmp_path / f"meeting-{next(count)}"
        meeting.mkdir()
        common = ("--master-port", master, "--master-progress-port", port, *further)
        places = ((0, (*common, "--port", port)), (1, common))
        return [
            make_agent(
                run,
                node=node,
                does=(does or {}) | {"meeting": str(meeting)},
                arguments=arguments,
                environment={"FINETUNE_MASTER": "127.0.0.1", **(environment or {})},
                **settings,
            ).start()
            for node, arguments in places
        ]

    return start


def stop(nodes: list[Agent]) -> list[int]:
    """SIGTERM to all of them, as when a Job is deleted; their exit codes."""
    for node in nodes:
        assert node.process is not None
        node.process.terminate()
    return [node.finish() for node in nodes]


def printed(nodes: list[Agent]) -> str:
    return "\n".join(f"--- node {node.node}\n{node.out}\n{node.err}" for node in nodes)


def nodes_of(output: Path, step: int) -> dict[str, int]:
    """Which node each file of a committed checkpoint came from."""
    (manifest,) = output.glob(f"checkpoints/fence-*/step-{step}/MANIFEST.json")
    return {part["name"]: part["node"] for part in json.loads(manifest.read_text())["parts"]}


def test_a_stop_stores_the_files_of_all_nodes_and_each_node_gets_them_back(make_run, start_gang, output) -> None:
    run = make_run(nodes=2)
    first = start_gang(run, does={"steps": 10_000, "save_every": 5, "step_seconds": 0.1})
    first[0].wait_for_event("checkpoint stored")
    assert stop(first) == [100, 100], printed(first)
    stored = first[0].message.checkpoint_step
    assert stored == max(event["step"] for event in first[1].events("checkpoint part stored"))
    found = nodes_of(output, stored)
    assert (found["rank-0.bin"], found["rank-1.bin"], found["weights.bin"]) == (0, 1, 0)
    second = start_gang(run, attempt=1, does={"steps": stored + 2})
    assert [node.finish() for node in second] == [0, 0], printed(second)
    for node in second:
        for rank in (0, 1):
            assert (node.work / "resume" / f"rank-{rank}.bin").read_text() == f"rank {rank} after step {stored}"
    assert second[0].message.resumed_from_step == stored
    assert steps_in(output)[0] == stored + 2
    assert sorted(path.name for path in (output / "fences").iterdir()) == ["1", "1.taken", "2", "2.taken"]
    assert second[1].events("artifact published") == []
    third = start_gang(run, attempt=2)
    assert [node.finish() for node in third] == [0, 0], printed(third)
    assert "published the artifact already" in third[1].message.message


def test_a_node_that_cannot_store_its_part_costs_the_checkpoint_and_not_the_run(make_run, start_gang, output) -> None:
    does = {"steps": 8, "save_every": 4, "step_seconds": 0.1, "link_rank": 1}
    nodes = start_gang(make_run(nodes=2), does=does)
    assert [node.finish() for node in nodes] == [0, 0], printed(nodes)
    assert steps_in(output) == []
    assert (output / "adapter" / "adapter.json").exists()
    told = nodes[0].events("a node's part is missing")[0]["error"]
    assert "node 1 lacks it" in told and "is a link" in told
    assert "is a link" in nodes[1].events("checkpoint part given up")[0]["why"]
    assert nodes[0].message.checkpoint_step is None


def test_node_0_tells_why_another_node_failed(make_run, start_gang) -> None:
    """Node 0 sees of it only that contact was lost."""
    does = {"steps": 10_000, "fail_rank": 1, "fail_step": 3}
    nodes = start_gang(make_run(nodes=2), "--stop-budget", "4", does=does)
    assert [node.finish() for node in nodes] == [65, 65], printed(nodes)
    assert nodes[0].message.outcome == "DataInvalid"
    assert "rank 1 met DataInvalid" in nodes[0].message.message
    assert nodes[0].message.message.startswith("node 1: ")


def test_a_hang_on_another_node_is_told_with_the_stacks_of_all_ranks(make_run, start_gang, output) -> None:
    does = {"steps": 10_000, "hang_step": 4, "hang_rank": 1}
    nodes = start_gang(make_run(nodes=2), "--hang-seconds", "2", "--stop-budget", "4", does=does)
    assert [node.finish() for node in nodes] == [84, 84], printed(nodes)
    message = nodes[0].message.message
    assert "The cause is on another node" in message
    assert "Node 1: All workers were silent" in message
    assert "Rank 1 fell silent while reading data." in message
    for rank in (0, 1):
        assert "in one_step" in (output / "logs" / "attempt-0" / f"rank-{rank}.log").read_text()


def test_two_nodes_stopped_and_resumed_train_to_the_bit_as_undisturbed(tmp_path: Path, start_gang: StartGang) -> None:
    with Zygote(tmp_path / "model") as zygote:
        start = partial(start_gang, module="tests.chaos.relay", environment=forked(zygote))
        stop_and_resume(tmp_path, start, tmp_path / "model", steps=25)


@pytest.mark.slow
def test_a_vanished_node_ends_the_gang_and_the_next_attempt_goes_on(tmp_path: Path, start_gang: StartGang) -> None:
    with Zygote(tmp_path / "model") as zygote:
        start = partial(start_gang, module="tests.chaos.relay", environment=forked(zygote))
        run = real_run(tmp_path, "vanished", tmp_path / "model", 60, 0)
        run = run.model_copy(update={"checkpoint": run.checkpoint.model_copy(update={"every_steps": 5})})
        nodes = start(run, "--stop-budget", "4")
        nodes[0].wait_for_event("checkpoint stored")
        nodes[1].process.kill()
        nodes[1].process.wait()
        assert nodes[0].finish() == 85, printed(nodes)
        stored = nodes[0].message.checkpoint_step
        assert (nodes[0].message.outcome, stored % 5) == ("CollectiveFailed", 0)
        second = start(run, attempt=1)
        assert [node.finish() for node in second] == [0, 0], printed(second)
        assert second[1].message.resumed_from_step == second[0].message.resumed_from_step == stored


@pytest.mark.slow
def test_two_nodes_under_zero_stopped_and_resumed_train_to_the_bit_as_undisturbed(
    tmp_path: Path, start_gang: StartGang
) -> None:
    start = partial(start_gang, module="finetune_trainer.worker")
    stop_and_resume(tmp_path, start, tiny_model("llama"), steps=200, zero_stage=2)


def forked(zygote: Zygote) -> dict[str, str]:
    """The environment in which workers are forked from zygote; their steps are slow enough to be stopped in between."""
    return {
        SOCKET_VARIABLE: zygote.address,
        journal.FILE_VARIABLE: os.devnull,
        journal.STEP_SECONDS_VARIABLE: "0.2",
    }


def stop_and_resume(tmp_path: Path, start_gang: StartGang, model: Path, *, steps: int, zero_stage: int = 0) -> None:
    """A run without a disturbance, and one whose nodes are told to end in the middle; both make the same losses."""
    begun = time.monotonic()
    straight = start_gang(real_run(tmp_path, "straight", model, steps, zero_stage))
    assert straight[0].finish() == 0, printed(straight)
    check_time(straight[0], time.monotonic() - begun)
    assert straight[1].finish() == 0, printed(straight)
    run = real_run(tmp_path, "stopped", model, steps, zero_stage)
    first = start_gang(run)
    first[0].wait_for_step(3)
    assert stop(first) == [100, 100], printed(first)
    stored = first[0].message.checkpoint_step
    assert stored is not None and 3 <= stored < steps
    own = {name for name, node in nodes_of(tmp_path / "stopped", stored).items() if node == 1}
    assert "rng_state_1.pth" in own
    assert not own & {"adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "run.json", "plan.json"}
    if zero_stage:
        assert any("zero_pp_rank_1_mp_rank_00" in name for name in own), own
    second = start_gang(run, attempt=1)
    assert [node.finish() for node in second] == [0, 0], printed(second)
    assert second[0].message.resumed_from_step == stored
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")
    assert len(losses(tmp_path / "straight")) == steps


def check_time(agent: Agent, wall_seconds: float) -> None:
    spent = agent.message.spent
    assert spent is not None
    assert spent.total == pytest.approx(wall_seconds, rel=0.01)
    assert min(spent.start, spent.train, spent.evaluate, spent.save) > 0
    assert spent.redo == 0


def losses(output: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of each step."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["gradNorm"]) for line in lines if "loss" in line]


def real_run(tmp_path: Path, name: str, model: Path, steps: int, zero_stage: int) -> RunFile:
    """LoRA with dropout on two nodes of one process: a rank that lost its random state would be seen in the loss."""
    data = tmp_path / "sums.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"{n} + {n} =", "completion": f" {2 * n}"}) + "\n" for n in range(40))
    )
    output = (tmp_path / name).as_uri()
    run = run_file(model.as_uri(), data.as_uri(), output, nodes=2, scratch=tmp_path / f"scratch-{name}")
    document = run.to_json()
    document["tuning"] = {
        "type": "LoRA",
        "lora": {
            "rank": 4,
            "alpha": 8,
            "dropout": 0.2,
            "targetModules": ["all-linear"],
            "bias": "None",
            "variant": "Standard",
        },
    }
    document["hyperparameters"] |= {"totalSteps": steps, "maxSequenceLength": 64, "zeroStage": zero_stage}
    document["dataset"]["promptTemplate"] = "{prompt}{completion}"
    document["dataset"]["validationFraction"] = 0.2
    document["evaluation"]["everySteps"] = 10
    document["checkpoint"]["everySteps"] = 1000
    return RunFile.from_json(document)

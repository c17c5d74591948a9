"""A run on local folders, ready to be started with any behaviour of the stand-in worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.runfile import RunFile
from tests.train.agent.runs import Agent, run_file, write_inputs

MakeAgent = Callable[..., Agent]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "output"


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A folder with the model `base` and the data `train.jsonl`."""
    write_inputs(tmp_path / "inputs")
    return tmp_path / "inputs"


@pytest.fixture
def make_run(tmp_path: Path, inputs: Path, output: Path) -> Callable[..., RunFile]:
    model, data = (inputs / "base").as_uri(), (inputs / "train.jsonl").as_uri()
    count = iter(range(1000))

    def make(**changes: Any) -> RunFile:
        return run_file(model, data, output.as_uri(), scratch=tmp_path / "scratch" / str(next(count)), **changes)

    return make


@pytest.fixture
def make_agent(tmp_path: Path, make_run: Callable[..., RunFile]) -> Iterator[MakeAgent]:
    """Agents that end with the test, whatever happens."""
    made: list[Agent] = []

    def make(run: RunFile | None = None, **settings: Any) -> Agent:
        agent = Agent(run or make_run(), tmp_path / f"agent-{len(made)}", **settings)
        made.append(agent)
        return agent

    yield make
    for agent in made:
        if agent.process is not None and agent.process.poll() is None:
            agent.process.kill()
            agent.process.wait()

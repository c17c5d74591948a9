"""The catalogue: every seeded failure ends with the class, message, field and exit code of the table, and the operator
does with it what the table says: one attempt for what a person has to mend, its retries for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune_api.failures import Fault
from finetune_api.runfile import RunFile
from finetune_api.status import ConditionType, State
from tests.chaos.failures import at_preflight, in_training
from tests.chaos.failures.scenario import Place, Scenario
from tests.cluster.s3 import S3Server
from tests.train.agent.runs import Agent, run_file, write_inputs
from tests.unit.operator.builders import a_job, a_spec
from tests.unit.operator.world import World

BEFORE, DURING = at_preflight.SCENARIOS, in_training.SCENARIOS


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        server.add_user("team-a")
        server.create_bucket("team-a", owner="team-a")
        server.create_bucket("foreign")
        yield server


@pytest.fixture
def place(tmp_path: Path, s3: S3Server) -> Iterator[Place]:
    made: list[Agent] = []
    write_inputs(tmp_path / "inputs")
    model, data = ((tmp_path / "inputs" / name).as_uri() for name in ("base", "train.jsonl"))
    numbers = iter(range(100))

    def run(**changes: object) -> RunFile:
        scratch = tmp_path / "scratch" / str(next(numbers))
        return run_file(model, data, (tmp_path / "output").as_uri(), scratch=scratch, **changes)

    def agent(given: RunFile | None = None, **settings: object) -> Agent:
        made.append(Agent(given or run(), tmp_path / f"agent-{len(made)}", **settings))
        return made[-1]

    yield Place(tmp_path, s3, agent, run)
    for one in made:
        if one.process is not None and one.process.poll() is None:
            one.process.kill()
            one.process.wait()


def named(scenarios: list[Scenario]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return pytest.mark.parametrize("scenario", scenarios, ids=[one.name for one in scenarios])


def check_last_words(scenario: Scenario, place: Place) -> tuple[str, str | None]:
    """The program's last words are those of the scenario and of the table; returns message and field."""
    found = scenario.make(place)
    assert (found.failure_class, found.field) == (scenario.failure_class, scenario.field), found.message
    assert found.exit_code == scenario.row.exit_code
    assert [word for word in scenario.says if word not in found.message] == [], found.message
    return found.message, found.field


@named(BEFORE)
def test_a_mistake_is_told_by_preflight(scenario: Scenario, place: Place) -> None:
    check_last_words(scenario, place)
    # What a person has to mend is not tried again; a storage that may come back is.
    assert scenario.row.retriable is (scenario.row.fault is not Fault.USER)


@named(DURING)
def test_a_fault_is_told_by_the_trainer_and_tried_again_as_the_table_says(scenario: Scenario, place: Place) -> None:
    message, field = check_last_words(scenario, place)
    row = scenario.row
    words = {"message": message[:2048], "field": field}
    spec = a_spec(retry={"maxFailures": 2})
    status = World(a_job(spec), outcomes=(scenario.failure_class,), words=words).run_to_the_end().job.status
    assert status.state == State.FAILED
    assert status.attempt == 1 + min(row.retries, 2), "attempts: the first, and the retries of its class"
    told = status.failure
    assert told is not None
    assert (told.failure_class, told.field, told.hint) == (scenario.failure_class, field, row.hint)
    assert scenario.says[0] in told.message
    condition = status.condition(ConditionType.FAILED)
    assert condition is not None and condition.reason == scenario.failure_class
    assert scenario.says[0] in condition.message and row.hint in condition.message


def test_there_are_at_least_thirty_each_with_a_name_of_its_own() -> None:
    names = [one.name for one in (*BEFORE, *DURING)]
    assert len(names) == len(set(names)) >= 30

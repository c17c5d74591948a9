"""The catalogue: every seeded failure ends with the class, message, field and exit code of the table, and the operator
does with it what the table says: one attempt for what a person has to mend, its retries for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune_api import naming
from finetune_api.runfile import RunFile
from finetune_api.status import ConditionType, FineTuneJobStatus, State
from tests.chaos.failures import at_preflight, in_training
from tests.chaos.failures.scenario import MAX_FAILURES, SPEC, Ending, Place, Scenario
from tests.cluster.s3 import S3Server
from tests.train.agent.runs import Agent, run_file, write_inputs
from tests.unit.operator.builders import CONFIG, UID, a_job
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


def check_last_words(scenario: Scenario, place: Place) -> Ending:
    """The program's last words are those of the scenario and of the table."""
    found = scenario.make(place)
    assert (found.failure_class, found.field) == (scenario.failure_class, scenario.field), found.message
    assert found.exit_code == scenario.row.exit_code
    assert [word for word in scenario.says if word not in found.message] == [], found.message
    return found


def check_status(scenario: Scenario, status: FineTuneJobStatus) -> None:
    """The operator tells of the scenario as the table has it, with the field and the words of the program."""
    told, condition = status.failure, status.condition(ConditionType.FAILED)
    assert told is not None
    assert (told.failure_class, told.field, told.hint) == (scenario.failure_class, scenario.field, scenario.row.hint)
    assert scenario.says[0] in told.message
    assert condition is not None and condition.reason == scenario.failure_class
    assert scenario.says[0] in condition.message and scenario.row.hint in condition.message


def tries(scenario: Scenario) -> int:
    """The first one, and the retries of its class."""
    return 1 + min(scenario.row.retries, MAX_FAILURES)


@named(BEFORE)
def test_a_mistake_is_told_by_preflight_and_tried_again_as_the_table_says(scenario: Scenario, place: Place) -> None:
    found = check_last_words(scenario, place)
    world = World(a_job(SPEC), preflight=(found.exit_code, found.left))
    world.run(lambda seen: seen.job.status.state == State.INVALID)
    for _ in range(int(2 * CONFIG.retry_max_seconds)):
        world.tick()
        world.reconcile()
    assert world.job.status.state == State.INVALID
    assert [name for name, _ in world.created] == [naming.preflight_name("faq", UID, 1)] * tries(scenario)
    check_status(scenario, world.job.status)


@named(DURING)
def test_a_fault_is_told_by_the_trainer_and_tried_again_as_the_table_says(scenario: Scenario, place: Place) -> None:
    found = check_last_words(scenario, place)
    words = {"message": found.message[:2048], "field": found.field}
    status = World(a_job(SPEC), outcomes=(scenario.failure_class,), words=words).run_to_the_end().job.status
    assert status.state == State.FAILED
    assert status.attempt == tries(scenario)
    check_status(scenario, status)


def test_there_are_at_least_thirty_each_with_a_name_of_its_own() -> None:
    names = [one.name for one in (*BEFORE, *DURING)]
    assert len(names) == len(set(names)) >= 30

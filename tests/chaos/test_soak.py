"""The short form of the soak: one run that is stopped twice and killed twice on its way."""

from __future__ import annotations

import json
import math

from tests.chaos.hits import KILL, MOMENTS, STOP, Plan
from tests.chaos.runs import Cloud, Undisturbed
from tests.chaos.soak import Soak

_BY_NAME = {moment.name: moment for moment in MOMENTS}


def test_a_run_that_is_stopped_and_killed_gives_what_an_undisturbed_one_gives(
    place: Cloud, reference: Undisturbed
) -> None:
    hits = [
        Plan(STOP, _BY_NAME["training"], 0.2),
        Plan(KILL, _BY_NAME["saving"], 0.1),
        Plan(KILL, _BY_NAME["training"], 0.3),
        Plan(STOP, _BY_NAME["publishing"], 0.2),
    ]
    soak = Soak(place, reference, list(hits))
    soak.execute()
    assert soak.broken == []
    (stop, lost_by_stop), (save, lost_in_save), (kill, lost_by_kill), (end, lost_at_end) = soak.hits
    assert (stop.plan, save.plan, kill.plan, end.plan) == tuple(hits)
    assert (stop.stage, stop.exit_code, lost_by_stop) == ("Training", 100, 0)
    assert 0 < stop.reached == stop.stored < len(reference.steps)
    assert (save.exit_code, kill.exit_code) == (-9, -9)
    assert save.reached - lost_in_save >= save.stored >= stop.stored
    assert kill.reached - lost_by_kill >= kill.stored >= save.stored
    assert (end.reached, end.stored, lost_at_end) == (len(reference.steps), len(reference.steps), 0)


def test_a_step_that_differs_in_one_bit_is_found(place: Cloud, reference: Undisturbed) -> None:
    """What the other test rests on."""
    attempt = place.attempt(place.make_run(), 0)
    attempt.agent.folder.mkdir(parents=True)
    loss, norm, rate = reference.steps[10]
    made = {9: reference.steps[9], 10: (math.nextafter(loss, 0), norm, rate)}
    lines = [json.dumps({"time": 0.0, "step": step, "figures": figures}) for step, figures in made.items()]
    (attempt.agent.folder / "journal.jsonl").write_text("".join(line + "\n" for line in lines))
    soak = Soak(place, reference, [])
    soak.compare_steps(attempt)
    assert len(soak.broken) == 1 and soak.broken[0].startswith("step 10 has")

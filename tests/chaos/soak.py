"""`python -m tests.chaos.soak --stops N --kills N --seed S`: runs that are interrupted at random moments till they end.

Each run is started again and again, as the operator would, and hit by SIGTERM or SIGKILL, until it is finished; then
the next one begins, until all hits were made. Prints each broken promise and a table; the exit code is 1 if one was
broken. The promises stand in docs/reliability.md.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finetune_api.failures import TABLE, by_exit_code
from finetune_api.runfile import RunFile
from tests.chaos.hits import KILL, STOP, Hit, Plan, draw, strike
from tests.chaos.runs import STOP_SECONDS, Attempt, Cloud, Undisturbed, cloud, undisturbed

_STOPPED = TABLE["Stopped"]
# An upload of this run takes a tenth of a second. One that waits so long is stuck, however busy the machine.
_STUCK_SECONDS = 20.0
# From the end of the budget to the end of the process.
_LATE_SECONDS = 5.0
# As often as one run may end by itself before the soak gives up.
_OWN_ENDS = 3


@dataclass
class Soak:
    """All hits of one soak, and every promise that was broken, in words."""

    place: Cloud
    reference: Undisturbed
    plans: list[Plan]
    hits: list[tuple[Hit, int]] = field(default_factory=list)
    """Each hit with the number of steps that were lost by it."""
    attempts: int = 0
    runs: int = 0
    broken: list[str] = field(default_factory=list)

    def execute(self) -> None:
        """Runs until there are no plans left, the last one to its end."""
        while self.plans:
            self._finish(self.place.make_run())
            self.runs += 1
            stops = sum(hit.plan.how == STOP for hit, _ in self.hits)
            print(f"run {self.runs} finished: {stops} stops, {len(self.hits) - stops} kills so far", flush=True)

    def _finish(self, run: RunFile) -> None:
        """One run through all its attempts."""
        committed, open_hits, number, own = 0, list[Hit](), 0, 0
        while True:
            plan = self.plans[0] if self.plans else None
            attempt = self.place.attempt(run, number, plain=plan is not None and plan.plain)
            attempt.agent.start()
            hit = strike(attempt, plan) if plan else None
            code = attempt.agent.finish()
            self.attempts += 1
            if attempt.begun() or code == 0:
                # One that finds the artifact published takes nothing over, and has nothing left to do.
                self._settle(open_hits, attempt.resumed_from() if attempt.begun() else self.place.steps, committed, run)
                open_hits = []
            self.compare_steps(attempt)
            committed = max([committed, *attempt.stored()])
            if hit is not None:
                self.plans.pop(0)
                self._judge_end(hit, attempt)
                open_hits.append(hit)
            if code == 0:
                self._settle(open_hits, self.place.steps, committed, run)
                break
            if hit is None:
                said = (attempt.agent.out + attempt.agent.err)[-3000:]
                self._break(f"attempt {number} of run {self.runs + 1} ended by itself with exit code {code}: {said}")
                if (own := own + 1) == _OWN_ENDS:
                    raise RuntimeError("a run cannot be finished; what was broken stands above")
            attempt.clean()
            number += 1
        attempt.clean()
        if self.place.outcome(run) != self.reference.outcome:
            self._break(f"{run.output.target.uri} differs from the undisturbed run")

    def _settle(self, hits: Sequence[Hit], resumed: int, committed: int, run: RunFile) -> None:
        """Now it is known what the hits have cost."""
        if resumed < committed:
            self._break(f"{run.output.target.uri} went on from step {resumed}, but step {committed} was stored")
        for hit in hits:
            lost = max(0, hit.reached - resumed)
            self.hits.append((hit, lost))
            if hit.plan.how == STOP and lost > 1:
                self._break(f"a stop in {hit.stage} lost {lost} steps: {hit}")

    def _judge_end(self, hit: Hit, attempt: Attempt) -> None:
        if hit.waiting > _STUCK_SECONDS:
            self._break(f"a checkpoint waited for {hit.waiting:.1f} s: {hit}")
        if hit.plan.how == KILL:
            return
        if hit.seconds > STOP_SECONDS + _LATE_SECONDS:
            self._break(f"a stop took {hit.seconds:.1f} s: {hit}")
        # One that comes when all but the last word is done may find the run finished.
        if hit.exit_code not in (0, _STOPPED.exit_code):
            self._break(f"a stop in {hit.stage} ended with {hit.exit_code}: {attempt.agent.out[-2000:]}")

    def compare_steps(self, attempt: Attempt) -> None:
        """Every step that was ever made, also those that were lost later, has the figures of the undisturbed run."""
        for step, figures in attempt.steps().items():
            if figures != self.reference.steps[step]:
                self._break(f"step {step} has {figures}, undisturbed {self.reference.steps[step]}")

    def _break(self, what: str) -> None:
        self.broken.append(what)
        print(f"BROKEN: {what}", flush=True)

    def table(self) -> str:
        """Hits and lost steps by stage."""
        rows = [f"{'hit in':12} {'hits':>5} {'lost steps: most, mean':>24}"]
        for how in (STOP, KILL):
            rows += [self._row(how, stage) for stage in sorted({h.stage for h, _ in self.hits if h.plan.how == how})]
        return "\n".join(rows)

    def _row(self, how: str, stage: str) -> str:
        lost = [lost for hit, lost in self.hits if (hit.plan.how, hit.stage) == (how, stage)]
        return f"{how} {stage:12} {len(lost):>4} {max(lost):>15} {sum(lost) / len(lost):>8.2f}"

    def summary(self) -> str:
        """One line. Kills by how many due saves were not committed: none, the one in flight, more than an upload."""
        stops = [(hit, lost) for hit, lost in self.hits if hit.plan.how == STOP]
        kills = [(hit, lost) for hit, lost in self.hits if hit.plan.how == KILL]
        codes = Counter(hit.exit_code for hit, _ in stops)
        retries = sum(code != 0 and by_exit_code(code).counted for code in codes.elements())
        by_saves = [[lost for hit, lost in kills if min(hit.behind, 2) == behind] for behind in range(3)]
        cost = "; ".join(
            f"{len(lost)} {when}: at most {max(lost, default=0)} steps lost"
            for lost, when in zip(
                by_saves, ("with all saves committed", "with one in flight", "with more"), strict=True
            )
        )
        return (
            f"soak: {len(stops)} stops (at most {max((lost for _, lost in stops), default=0)} steps lost, exit codes "
            f"{dict(codes)}, {retries} retries used, longest {max((hit.seconds for hit, _ in stops), default=0.0):.1f} s) "
            f"and {len(kills)} kills ({cost}) over {self.runs} runs and {self.attempts} attempts; "
            f"{len(self.broken)} promises broken"
        )


def main() -> int:
    """1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="tests.chaos.soak", description=__doc__)
    parser.add_argument("--stops", type=int, default=100, help="how many SIGTERMs")
    parser.add_argument("--kills", type=int, default=100, help="how many SIGKILLs")
    parser.add_argument("--plain", type=int, default=10, help="how many of them on workers from a bare interpreter")
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    given = parser.parse_args()
    plans = draw(given.stops, given.kills, given.plain, random.Random(given.seed))
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, cloud(Path(folder)) as place:
        soak = Soak(place, undisturbed(place, plain=True), plans)
        soak.execute()
    print(soak.table())
    print(f"{soak.summary()}; {time.monotonic() - begun:.0f} s, seed {given.seed}")
    return 1 if soak.broken else 0


if __name__ == "__main__":
    sys.exit(main())

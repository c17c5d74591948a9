"""`python -m tests.chaos.outages`: the storage is away, silent or slow while a real run goes on.

Every scenario ends with the losses and the adapter of a run that nothing disturbed, bit by bit. Prints a line for
each; the exit code is 1 if one failed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
import urllib.request
from collections.abc import Callable
from pathlib import Path

from finetune_api.failures import by_exit_code
from finetune_api.runfile import RunFile
from tests.chaos.proxy import Proxy
from tests.chaos.runs import SAVE_STEPS, Attempt, Cloud, Undisturbed, cloud, undisturbed

# Steps that go on for long enough to see the agent's pause after a failed upload (15 s) from both sides.
_LONG_STEP_SECONDS = 0.8
_SLOW_BYTES_PER_SECOND = 50_000
_SILENCE_SECONDS = 8.0


def away_in_training(place: Cloud, reference: Undisturbed) -> str:
    """Training goes on while the server is gone; saves are skipped and counted; uploads go on when it is back."""
    run = place.make_run()
    attempt = _started(place, run, step_seconds=_LONG_STEP_SECONDS)
    _reach(attempt, 7)
    with _away(place):
        _reach(attempt, 27)
        stored = max(attempt.stored())
        assert stored <= 7, f"step {stored} cannot have been stored"
    assert attempt.wait_for(lambda: max(attempt.stored()) >= 25), attempt.agent.out
    skipped = _counter(attempt, "finetune_checkpoints_skipped_total")
    failures = _counter(attempt, "finetune_checkpoint_upload_failures_total")
    _finish(place, run, attempt, reference)
    assert skipped >= 2 and failures >= 1, (skipped, failures)
    assert len(attempt.agent.events("checkpoint skipped")) >= skipped
    return f"{skipped:.0f} saves skipped, {failures:.0f} uploads failed"


def away_at_the_end(place: Cloud, reference: Undisturbed) -> str:
    """The workers are through while the server is gone: checkpoint and artifact wait for it."""
    run = place.make_run()
    attempt = _started(place, run)
    _reach(attempt, place.steps // 2)
    with _away(place):
        assert attempt.wait_for(lambda: _failures(attempt)), attempt.agent.out
        assert attempt.wait_for(lambda: attempt.agent.events("worker ended")), attempt.agent.out
    _finish(place, run, attempt, reference)
    assert max(attempt.stored()) == place.steps
    return f"{len(_failures(attempt))} tries failed"


def away_at_the_start(place: Cloud, reference: Undisturbed) -> str:
    """An attempt that cannot reach the server says so and may be repeated; the next one goes on where it was."""
    run = place.make_run()
    first = _started(place, run)
    _reach(first, 2 * SAVE_STEPS)
    assert first.wait_for(first.stored)
    first.kill()
    with _away(place):
        second = _started(place, run, number=1)
        code = second.agent.finish()
    row = by_exit_code(code)
    assert row.name == second.agent.message.outcome == "StorageUnavailable" and row.retriable, second.agent.out
    third = _started(place, run, number=2)
    _finish(place, run, third, reference)
    assert third.resumed_from() >= max(first.stored())
    return f"{row.name}, then resumed from step {third.resumed_from()}"


def silent_in_training(place: Cloud, reference: Undisturbed) -> str:
    """Connections stay open and nothing passes for a while, in the middle of uploads."""
    with Proxy(place.server.port) as proxy:
        run = place.make_run(proxy.endpoint)
        attempt = _started(place, run, step_seconds=0.3)
        _reach(attempt, 7)
        proxy.rate = 0
        time.sleep(_SILENCE_SECONDS)
        made = max(attempt.steps())
        proxy.rate = None
        _finish(place, run, attempt, reference)
    assert made > 7 + SAVE_STEPS, f"training stood still at step {made}"
    return f"step {made} was reached in the silence, {len(attempt.agent.events('checkpoint skipped'))} saves skipped"


def slow(place: Cloud, reference: Undisturbed) -> str:
    """Uploads take longer than the interval of saves; the node is lost on the way."""
    with Proxy(place.server.port) as proxy:
        run = place.make_run(proxy.endpoint)
        first = _started(place, run)
        _reach(first, 2)
        proxy.rate = _SLOW_BYTES_PER_SECOND
        assert first.wait_for(lambda: first.agent.events("checkpoint skipped") and first.stored()), first.agent.out
        first.kill()
        second = _started(place, run, number=1)
        _finish(place, run, second, reference)
    skipped = [len(attempt.agent.events("checkpoint skipped")) for attempt in (first, second)]
    assert second.resumed_from() >= max(first.stored())
    return f"{sum(skipped)} saves skipped, resumed from step {second.resumed_from()}"


SCENARIOS: tuple[Callable[[Cloud, Undisturbed], str], ...] = (
    away_in_training,
    away_at_the_end,
    away_at_the_start,
    silent_in_training,
    slow,
)


class _away:
    """The server is gone within the block."""

    def __init__(self, place: Cloud) -> None:
        self._server = place.server

    def __enter__(self) -> None:
        self._server.stop()

    def __exit__(self, *_: object) -> None:
        self._server.start()


def _started(place: Cloud, run: RunFile, *, number: int = 0, step_seconds: float | None = None) -> Attempt:
    pace = {} if step_seconds is None else {"step_seconds": step_seconds}
    attempt = place.attempt(run, number, **pace)
    attempt.agent.start()
    return attempt


def _reach(attempt: Attempt, step: int) -> None:
    assert attempt.wait_for(lambda: step in attempt.steps()), attempt.agent.out + attempt.agent.err


def _failures(attempt: Attempt) -> list[object]:
    return [*attempt.agent.events("checkpoint upload failed"), *attempt.agent.events("publishing failed")]


def _counter(attempt: Attempt, name: str) -> float:
    port = (attempt.agent.work / "state" / "port").read_text()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name + " "))


def _finish(place: Cloud, run: RunFile, attempt: Attempt, reference: Undisturbed) -> None:
    """The attempt ends well, and with the undisturbed results."""
    assert attempt.agent.finish() == 0, attempt.agent.out + attempt.agent.err
    wrong = {step: figures for step, figures in attempt.steps().items() if figures != reference.steps[step]}
    assert not wrong, f"these steps differ from the undisturbed run: {wrong}"
    assert place.outcome(run) == reference.outcome


def main() -> int:
    """1 if a scenario failed."""
    parser = argparse.ArgumentParser(prog="tests.chaos.outages", description=__doc__)
    names = {scenario.__name__: scenario for scenario in SCENARIOS}
    parser.add_argument("names", nargs="*", default=list(names), help=", ".join(names))
    failed = 0
    with tempfile.TemporaryDirectory(prefix="outages-") as folder, cloud(Path(folder)) as place:
        reference = undisturbed(place)
        chosen = parser.parse_args().names
        for name in chosen:
            begun = time.monotonic()
            try:
                told = names[name](place, reference)
            except AssertionError:
                failed += 1
                told = f"FAILED\n{traceback.format_exc()}"
            print(f"outage {name}: {told}; {time.monotonic() - begun:.0f} s", flush=True)
    print(f"outages: {len(chosen) - failed} of {len(chosen)} runs ended with the undisturbed losses")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

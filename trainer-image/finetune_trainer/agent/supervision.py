"""Watches the workers from their start to their end: first failure, stop, hang, takeover, refused checkpoints."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from finetune_api.documents import Stage
from finetune_api.failures import by_exit_code
from finetune_trainer.agent.classify import classify
from finetune_trainer.agent.ending import STOPPED, SUCCEEDED, End, from_error
from finetune_trainer.agent.gang import Exit, Gang
from finetune_trainer.agent.hang import HangLimits, HangWatch, Sign, tell_silence
from finetune_trainer.agent.log import Log
from finetune_trainer.agent.memory_events import count_kills, find_counter
from finetune_trainer.agent.node_uploads import NodeUploads
from finetune_trainer.agent.progress import ProgressBoard
from finetune_trainer.agent.settings import Settings
from finetune_trainer.agent.stopping import StopSignal
from finetune_trainer.agent.timekeeping import Activity
from finetune_trainer.agent.uploads import CheckpointUploader
from finetune_trainer.agent.workdir import WorkDir

_TICK_SECONDS = 0.05
_STACK_SECONDS = 2.0
_GANG_STACK_SECONDS = 6.0
_MAX_ACTIVITY_BYTES = 64
# Steps are due in these stages; loading and publishing may take minutes without one.
_STEPPING = (Stage.TRAINING, Stage.EVALUATING)


@dataclass
class Supervisor:
    """Runs the gang to its end; the end of the workers is `Succeeded`, `Stopped` or a failure."""

    gang: Gang
    work: WorkDir
    settings: Settings
    stop: StopSignal
    board: ProgressBoard
    uploader: CheckpointUploader | NodeUploads | None
    log: Log
    _exits: list[Exit] = field(default_factory=list, init=False)
    _counter: Path | None = field(default=None, init=False)
    _kills_before: int = field(default=0, init=False)

    def run(self) -> End:
        """Start the workers and return how they ended; none of them runs any more then."""
        self._counter = self.settings.memory_events or find_counter()
        self._kills_before = count_kills(self._counter)
        watch = HangWatch(HangLimits(self.settings.hang_seconds, self.settings.start_seconds), time.monotonic())
        self.gang.start()
        self.log.info("workers started", ranks=list(self.gang.ranks))
        end = None
        while end is None:
            time.sleep(_TICK_SECONDS)
            end = self._look(watch)
        self.board.read_worker(self.work)
        return end

    def stop_deadline(self, *, for_workers: bool) -> float:
        """Monotonic time at which a requested stop has to be done; workers leave time for the upload."""
        begun = self.stop.time if self.stop.time is not None else time.monotonic()
        budget = self.settings.stop_seconds
        if not for_workers:
            return begun + budget
        last = self.uploader.last_seconds if self.uploader is not None else 0.0
        return begun + budget - min(budget / 2, max(budget / 10, 1.5 * last))

    def stop_is_over(self) -> bool:
        """Whether a stop was requested and its whole budget is used up."""
        return self.stop.requested and time.monotonic() > self.stop_deadline(for_workers=False)

    def _look(self, watch: HangWatch) -> End | None:
        self._exits += self._log_exits(self.gang.reap())
        self.board.read_worker(self.work)
        failed = [ended for ended in self._exits if not _is_good(ended)]
        if failed:
            return self._end_by_failure()
        if not self.gang.running:
            self.gang.end(0)
            return self._end_of_all()
        if self.uploader is not None and self.uploader.fatal is not None:
            self._exits += self._log_exits(self.gang.end(self.settings.kill_seconds))
            return from_error(self.uploader.fatal)
        if self.stop.requested:
            return self._stopping()
        return self._hang(watch)

    def _stopping(self) -> End | None:
        if not self.work.stop_file.exists():
            self.work.stop_file.touch()
            self.log.info("stop requested", budget_seconds=self.settings.stop_seconds)
        if time.monotonic() < self.stop_deadline(for_workers=True):
            return None
        self._exits += self._log_exits(self.gang.end(0))
        self.log.warning("workers killed", why="they did not save and stop within the budget")
        return End(STOPPED, "Stopped on request. The workers did not save within the budget and were killed.")

    def _hang(self, watch: HangWatch) -> End | None:
        now = time.monotonic()
        document = self.board.document
        signs = [self._sign(rank) for rank in self.gang.ranks]
        watch.see(
            now,
            tuple(sign.time for sign in signs),
            document.step if document.stage in _STEPPING else None,
            stepping=document.stage in _STEPPING,
        )
        if not watch.is_hung(now):
            return None
        silence, limit = round(watch.silence(now)), round(watch.limit)
        told = tell_silence(signs, whole_gang=self.gang.is_whole)
        doing = {str(sign.rank): sign.activity for sign in signs}
        self.log.error("workers hang", silence_seconds=silence, limit_seconds=limit, step=document.step, doing=doing)
        self.gang.dump_stacks()
        # Where other nodes find the same hang, their stacks have to be out before these workers' end disturbs theirs.
        time.sleep(_STACK_SECONDS if self.gang.is_whole else _GANG_STACK_SECONDS)
        self._exits += self._log_exits(self.gang.end(0))
        return End(
            "Hang",
            f"All workers were silent for {silence} s after step {document.step} in stage "
            f"{document.stage.value}; the limit is {limit} s. {told} Their stacks are in the log.",
        )

    def _sign(self, rank: int) -> Sign:
        path = self.work.heartbeat(rank)
        try:
            said = path.read_bytes()[:_MAX_ACTIVITY_BYTES].decode(errors="replace").strip()
            return Sign(rank, path.stat().st_mtime_ns, Activity(said) if said in set(Activity) else None)
        except OSError:
            return Sign(rank, 0, None)

    def _end_by_failure(self) -> End:
        self._exits += self._log_exits(self.gang.end(self.settings.kill_seconds))
        errors = {rank: error for rank in self.gang.ranks if (error := self.work.error(rank)) is not None}
        tails = {rank: self.gang.error_tail(rank) for rank in self.gang.ranks}
        return classify(self._exits, errors, tails, count_kills(self._counter) - self._kills_before)

    def _end_of_all(self) -> End:
        if all(ended.code == 0 for ended in self._exits):
            return End(SUCCEEDED)
        return End(STOPPED, "Stopped on request at a step boundary.")

    def _log_exits(self, exits: list[Exit]) -> list[Exit]:
        for ended in exits:
            self.log.info(
                "worker ended", rank=ended.rank, code=ended.code, signal=ended.signal, collateral=ended.by_agent
            )
        return exits


def _is_good(ended: Exit) -> bool:
    return ended.code is not None and (ended.code == 0 or by_exit_code(ended.code).name == STOPPED)

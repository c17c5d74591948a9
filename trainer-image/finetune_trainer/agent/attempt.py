"""The main flow of one attempt on one node, from the run file to the exit code."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from finetune_api.documents import Stage
from finetune_api.failures import FinetuneError
from finetune_api.guards import GuardState
from finetune_api.runfile import RunFile
from finetune_trainer.agent import guarding, inputs, output_store, peers
from finetune_trainer.agent.ending import (
    REQUIREMENT_NOT_MET,
    ROLLED_BACK,
    STOPPED,
    SUCCEEDED,
    End,
    from_error,
    termination_message,
    write_termination_log,
)
from finetune_trainer.agent.gang import Gang
from finetune_trainer.agent.guarding import Change
from finetune_trainer.agent.hub_repository import publish_to_hub
from finetune_trainer.agent.kept_logs import keep_logs, with_address
from finetune_trainer.agent.log import Log
from finetune_trainer.agent.metrics import Metrics
from finetune_trainer.agent.node_uploads import NodeUploads, asking
from finetune_trainer.agent.progress import ProgressBoard
from finetune_trainer.agent.publishing import Publisher
from finetune_trainer.agent.redaction import Redactor
from finetune_trainer.agent.serving import AgentServer, StartBoard
from finetune_trainer.agent.settings import Settings
from finetune_trainer.agent.stopping import OutOfTime, StopSignal, run_until, settle_limit
from finetune_trainer.agent.supervision import Supervisor
from finetune_trainer.agent.timekeeping import Phase, Timekeeper
from finetune_trainer.agent.uploads import CheckpointPolicy, CheckpointUploader
from finetune_trainer.agent.workdir import Result, WorkDir, write_whole
from finetune_trainer.sources import Reach
from finetune_trainer.sources.places import with_field
from finetune_trainer.store.errors import StoreError
from finetune_trainer.store.nodes import NodeUploader
from finetune_trainer.store.objects import ObjectStore
from finetune_trainer.store.writer import CheckpointWriter

T = TypeVar("T")
_NO_FAILURES = (SUCCEEDED, STOPPED, REQUIREMENT_NOT_MET)
_PUBLISHED_BEFORE = "An earlier attempt had published the artifact already."
_LOG_SECONDS = 10.0


class Attempt:
    """One try of the training gang, as this node sees it."""

    def __init__(self, settings: Settings, stop: StopSignal, redactor: Redactor, log: Log) -> None:
        self._settings = settings
        self._stop = stop
        self._redactor = redactor
        self._log = log
        self._work = WorkDir(settings.work)
        self._times = Timekeeper()
        self._board = ProgressBoard(settings.attempt, self._times)
        self._metrics = Metrics(self._board)
        self._start_board = StartBoard()
        self._reach = Reach(env=settings.environment, allow_file=settings.local)
        self._port = 0
        self._writer: CheckpointWriter | None = None
        self._guards = GuardState()
        self._node_uploads: NodeUploads | None = None
        self._output: tuple[ObjectStore, str] | None = None
        self._ends_of_logs: dict[int, str] = {}
        self._result: Result | None = None

    def run(self) -> int:
        """The exit code, after the termination message was written. Never raises."""
        try:
            end = self._run()
        except OutOfTime:
            end = End(STOPPED, "Stopped on request while nothing was at risk.")
        except Exception as error:  # the message is all that a person sees of it
            end = from_error(error)
        end = self._keep_logs(end)
        self._tell(end)
        return end.exit_code

    def _run(self) -> End:
        self._serve()
        self._prepare()
        run = inputs.read_run_file(self._settings.run_file)
        self._check_place(run)
        self._board.set(total_steps=run.hyperparameters.total_steps)
        store, prefix = self._output = output_store.open_output(run, self._reach)
        if self._settings.node_rank > 0:
            if not self._stoppable(lambda: self._join(run, store, prefix)):
                return End(SUCCEEDED, _PUBLISHED_BEFORE)
        elif not self._stoppable(lambda: self._begin(run, store, prefix)):
            return self._stoppable(lambda: self._finish_published(run, store, prefix))
        fetched = self._stoppable(lambda: inputs.fetch_inputs(run, self._work, self._reach))
        self._log.info("inputs fetched" if fetched else "inputs kept")
        return self._train(run)

    def _serve(self) -> None:
        server = AgentServer(self._settings.host, self._settings.port, self._board, self._metrics, self._start_board)
        server.run()
        self._port = server.port
        self._log.info("serving", port=server.port)

    def _prepare(self) -> None:
        self._work.prepare()
        write_whole(self._work.state / "port", str(self._port))

    def _check_place(self, run: RunFile) -> None:
        if not 0 <= self._settings.node_rank < run.resources.nodes:
            raise FinetuneError(
                f"this is node {self._settings.node_rank} of a run with {run.resources.nodes} node(s). The Job's "
                "completions and the run file have to agree.",
                failure_class="InvalidSpec",
            )

    def _begin(self, run: RunFile, store: ObjectStore, prefix: str) -> bool:
        """Claim, fence and restore on node 0; False if nothing is left to do."""
        try:
            output_store.claim(store, prefix, run)
        except StoreError as error:
            raise with_field(error, "output.uri") from None
        self._result = output_store.published_result(store, prefix, run)
        if self._result is not None:
            return False
        self._times.resumed_from(self._take_over(run, store, prefix))
        return True

    def _take_over(self, run: RunFile, store: ObjectStore, prefix: str, change: Change | None = None) -> int:
        """This start owns the output, and its guards are in force; the step that it goes on from."""
        self._times.enter(Phase.RESTORE)
        follows = self._writer.fence.fence if self._writer is not None else None
        opened = output_store.begin_attempt(
            store, prefix, run, self._settings.attempt, self._work, self._log, change=change, follows=follows
        )
        self._times.enter(Phase.START)
        fence = opened.writer.fence
        self._writer, self._guards = opened.writer, fence.guards
        step = opened.ref.step if opened.ref else None
        self._board.begin(step, self._guards)
        self._start_board.document = peers.start_document(self._settings.attempt, opened.ref, fence.fence, fence.guards)
        return step or 0

    def _finish_published(self, run: RunFile, store: ObjectStore, prefix: str) -> End:
        """What an earlier attempt had still to do after it had published the artifact to the output."""
        assert self._result is not None  # _begin found it
        if run.output.publish is not None:
            output_store.download_artifact(store, prefix, self._work.artifact)
        end = self._after_publishing(run, self._result)
        return End(end.outcome, end.message or _PUBLISHED_BEFORE, end.field)

    def _after_publishing(self, run: RunFile, result: Result) -> End:
        """The gate, and the hub's repository for a model that passes it."""
        if result.unmet is not None:
            return End(REQUIREMENT_NOT_MET, result.unmet, "spec.evaluation.require")
        if run.output.publish is not None and result.artifact != "report":
            url = publish_to_hub(run.output.publish, self._work.artifact / result.artifact, self._reach)
            self._log.info("published to the hub", url=url)
        return End(SUCCEEDED)

    def _join(self, run: RunFile, store: ObjectStore, prefix: str) -> bool:
        """Restore what node 0 goes on from; False if nothing is left to do."""
        if output_store.published_result(store, prefix, run) is not None:
            return False  # node 0 ends without a word to this node
        host, port, attempt = self._settings.master, self._settings.master_progress_port, self._settings.attempt
        started = peers.ask_node_0(host, port, attempt, wait_seconds=self._settings.peer_seconds)
        output_store.restore_from(store, prefix, started.ref, self._work, self._log)
        self._guards = started.guards
        uploader = NodeUploader(store, prefix, started.fence, self._settings.node_rank)
        self._node_uploads = NodeUploads(self._work, uploader, asking(host, port, attempt), self._log)
        self._node_uploads.start()
        return True

    def _train(self, run: RunFile) -> End:
        """The end of the workers; those of one node are started again as often as a guard has something to change."""
        found = self._run_workers(run)
        while isinstance(found, Change):
            self._change(run, found)
            if self._stop.requested:
                return End(STOPPED, f"Stopped on request; the next attempt begins with a change. {found.message}")
            found = self._run_workers(run)
        return found

    def _run_workers(self, run: RunFile) -> End | Change:
        """How the attempt ends after its workers, or what has to change before they start again."""
        uploader = self._uploader(run)
        gang, uploads = Gang(run, self._settings), uploader or self._node_uploads
        supervisor = Supervisor(gang, self._work, self._settings, self._stop, self._board, uploads, self._log)
        write_whole(self._work.guards_file, json.dumps(self._guards.to_json()))
        self._board.set(stage=Stage.LOADING)
        end = supervisor.run()
        self._times.enter(Phase.SAVE)
        self._ends_of_logs = gang.logs()
        if self._node_uploads is not None:
            return self._leave_gang(self._node_uploads, supervisor, end)
        assert uploader is not None and self._writer is not None  # node 0 has both
        if run.resources.nodes > 1:
            end = self._start_board.explain(end)
        publisher = Publisher(self._work, self._writer, uploader, supervisor, self._stop, self._board, self._log)
        document = self._board.document
        answer = guarding.answer(self._guards, end, run, stage=document.stage, step=document.step)
        if isinstance(answer, Change) and run.resources.nodes > 1:
            return self._leave_change(answer, self._writer, uploader, supervisor)
        if isinstance(answer, Change):
            to_step = answer.to_step
            try:
                self._stoppable(lambda: uploader.settle(to_step))
                return answer
            except OutOfTime:
                answer = End(STOPPED, "Stopped on request before a guard's change was in force.")
        end = answer
        if end.outcome == SUCCEEDED:
            try:
                result = self._result = publisher.publish()
                return self._stoppable(lambda: self._after_publishing(run, result))
            except OutOfTime:
                end = End(STOPPED, "Stopped on request while the artifact was being published.")
        return publisher.store_last_checkpoint(end)

    def _change(self, run: RunFile, change: Change) -> None:
        """A new start that holds the change; the work directory is as at the first one, the inputs are still there."""
        assert self._writer is not None  # only node 0 changes anything
        self._tell_change(change)
        store, prefix, step = self._writer.store, self._writer.prefix, self._board.document.step
        self._prepare()
        resumed = self._stoppable(lambda: self._take_over(run, store, prefix, change))
        self._times.roll_back(step, resumed)

    def _leave_change(
        self, change: Change, writer: CheckpointWriter, uploader: CheckpointUploader, supervisor: Supervisor
    ) -> End:
        """A gang's change is in the output for the next attempt; a stop ends the work for it only with its budget."""
        self._tell_change(change)
        step, begun, budget = self._board.document.step, time.monotonic(), self._settings.stop_seconds
        try:
            run_until(
                lambda: time.monotonic() > settle_limit(begun, self._stop.time, budget),
                lambda: uploader.settle(change.to_step),
            )
        except OutOfTime:
            self._log.warning("left early", why="the last checkpoint was not stored in time")
        try:
            fence = run_until(supervisor.stop_is_over, lambda: output_store.leave_change(writer, change))
        except OutOfTime:
            return End(STOPPED, f"Stopped on request before a guard's change was stored. {change.message}")
        base = fence.base.step if fence.base else None
        self._board.begin(base, fence.guards)
        self._times.roll_back(step, base or 0)
        return End(ROLLED_BACK, change.message)

    def _tell_change(self, change: Change) -> None:
        self._log.warning("guard", message=change.message, **change.guards.to_json())

    def _leave_gang(self, uploads: NodeUploads, supervisor: Supervisor, end: End) -> End:
        """Node 0 knows how this node ended, and has this node's part of the last checkpoint, as far as time allows.

        Kubernetes ends node 0 as soon as a node has failed. So one that failed for a reason to which node 0 may have an
        answer stays until it has ended.
        """
        settings, ended = self._settings, guarding.collateral(end)
        to_its_end = ended.outcome == "CollectiveFailed"
        if end.outcome not in _NO_FAILURES:
            place = settings.master, settings.master_progress_port
            peers.tell_node_0(*place, attempt=settings.attempt, node=settings.node_rank, end=end)
        limit = settings.peer_seconds if end.outcome == SUCCEEDED else settings.stop_seconds
        deadline = time.monotonic() + limit
        try:
            run_until(
                lambda: time.monotonic() > deadline or supervisor.stop_is_over(),
                lambda: uploads.flush(until_its_end=to_its_end),
            )
        except OutOfTime:
            self._log.warning("left early", why="node 0 had not done its last work in time")
        return ended

    def _uploader(self, run: RunFile) -> CheckpointUploader | None:
        """The background uploader of node 0."""
        if self._writer is None:
            return None
        policy = CheckpointPolicy(
            run.world_size,
            run.checkpoint.keep_last,
            run.digest(),
            keep_back=guarding.farthest_rollback(run),
            nodes=run.resources.nodes,
            nodes_seconds=self._settings.peer_seconds,
            storage_seconds=self._settings.storage_seconds,
        )
        uploader = CheckpointUploader(
            self._work, self._writer, policy, self._board, self._metrics, self._start_board, self._log
        )
        uploader.start()
        return uploader

    def _stoppable(self, action: Callable[[], T]) -> T:
        return run_until(lambda: self._stop.requested, action)

    def _keep_logs(self, end: End) -> End:
        """After a failure: end, with the address of a report and of what the workers printed last."""
        if end.outcome in _NO_FAILURES or not self._ends_of_logs or self._output is None:
            return end
        store, prefix = self._output
        document, node = self._board.document, self._settings.node_rank
        deadline = time.monotonic() + _LOG_SECONDS
        if self._stop.time is not None:  # the last words are worth more than the logs
            deadline = min(deadline, self._stop.time + self._settings.stop_seconds)
        try:
            address = run_until(
                lambda: time.monotonic() > deadline,
                lambda: keep_logs(store, prefix, end, document, self._ends_of_logs, self._redactor, node=node),
            )
        except (OutOfTime, FinetuneError, OSError) as error:
            self._log.warning("logs not kept", error=str(error) or f"not stored within {_LOG_SECONDS:g} s")
            return end
        return with_address(replace(end, message=self._redactor.text(end.message)), address)

    def _tell(self, end: End) -> None:
        document, result = self._board.document, self._result
        message = termination_message(
            end,
            self._redactor,
            step=document.step or None,
            checkpoint_step=document.checkpoint_step,
            artifact=result.artifact if result else None,
            base_eval_loss=result.base_eval_loss if result else None,
            eval_loss=result.eval_loss if result else None,
            resumed_from_step=document.resumed_from_step,
            spent=self._times.spent,
        )
        level = self._log.info if end.outcome in (SUCCEEDED, STOPPED) else self._log.error
        level(
            "attempt ended",
            outcome=end.outcome,
            exit_code=end.exit_code,
            message=end.message,
            field=end.field,
            step=document.step,
            checkpoint_step=document.checkpoint_step,
        )
        try:
            write_termination_log(self._settings.termination_log, message)
        except OSError as error:
            self._log.error("termination message not written", error=str(error))

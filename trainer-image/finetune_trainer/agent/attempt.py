"""The main flow of one attempt on one node, from the run file to the exit code."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from finetune_api.documents import Stage
from finetune_api.failures import FinetuneError
from finetune_api.runfile import RunFile
from finetune_trainer.agent import inputs, output_store, peers
from finetune_trainer.agent.ending import (
    REQUIREMENT_NOT_MET,
    STOPPED,
    SUCCEEDED,
    End,
    from_error,
    termination_message,
    write_termination_log,
)
from finetune_trainer.agent.gang import Gang
from finetune_trainer.agent.hub_repository import publish_to_hub
from finetune_trainer.agent.log import Log
from finetune_trainer.agent.metrics import Metrics
from finetune_trainer.agent.progress import ProgressBoard
from finetune_trainer.agent.publishing import Publisher
from finetune_trainer.agent.redaction import Redactor
from finetune_trainer.agent.serving import AgentServer, StartBoard
from finetune_trainer.agent.settings import Settings
from finetune_trainer.agent.stopping import OutOfTime, StopSignal, run_until
from finetune_trainer.agent.supervision import Supervisor
from finetune_trainer.agent.uploads import CheckpointPolicy, CheckpointUploader
from finetune_trainer.agent.workdir import Result, WorkDir, write_whole
from finetune_trainer.sources import Reach
from finetune_trainer.store.objects import ObjectStore
from finetune_trainer.store.writer import CheckpointWriter

T = TypeVar("T")


class Attempt:
    """One try of the training gang, as this node sees it."""

    def __init__(self, settings: Settings, stop: StopSignal, redactor: Redactor, log: Log) -> None:
        self._settings = settings
        self._stop = stop
        self._redactor = redactor
        self._log = log
        self._work = WorkDir(settings.work)
        self._board = ProgressBoard(settings.attempt)
        self._metrics = Metrics(self._board)
        self._start_board = StartBoard()
        self._reach = Reach(env=settings.environment, allow_file=settings.local)
        self._writer: CheckpointWriter | None = None
        self._result: Result | None = None

    def run(self) -> int:
        """The exit code, after the termination message was written. Never raises."""
        try:
            end = self._run()
        except OutOfTime:
            end = End(STOPPED, "Stopped on request while nothing was at risk.")
        except Exception as error:  # the message is all that a person sees of it
            end = from_error(error)
        self._tell(end)
        return end.exit_code

    def _run(self) -> End:
        self._work.prepare()
        self._serve()
        run = inputs.read_run_file(self._settings.run_file)
        self._check_place(run)
        self._board.set(total_steps=run.hyperparameters.total_steps)
        store, prefix = output_store.open_output(run, self._reach)
        if self._settings.node_rank > 0:
            self._stoppable(lambda: self._join(store, prefix))
        elif not self._stoppable(lambda: self._begin(run, store, prefix)):
            return self._stoppable(lambda: self._finish_published(run, store, prefix))
        fetched = self._stoppable(lambda: inputs.fetch_inputs(run, self._work, self._reach))
        self._log.info("inputs fetched" if fetched else "inputs kept")
        return self._train(run)

    def _serve(self) -> None:
        server = AgentServer(self._settings.host, self._settings.port, self._board, self._metrics, self._start_board)
        server.run()
        write_whole(self._work.state / "port", str(server.port))
        self._log.info("serving", port=server.port)

    def _check_place(self, run: RunFile) -> None:
        if not 0 <= self._settings.node_rank < run.resources.nodes:
            raise FinetuneError(
                f"this is node {self._settings.node_rank} of a run with {run.resources.nodes} node(s). The Job's "
                "completions and the run file have to agree.",
                failure_class="InvalidSpec",
            )

    def _begin(self, run: RunFile, store: ObjectStore, prefix: str) -> bool:
        """Claim, fence and restore on node 0; False if nothing is left to do."""
        output_store.claim(store, prefix, run)
        self._result = output_store.published_result(store, prefix, run)
        if self._result is not None:
            return False
        opened = output_store.begin_attempt(store, prefix, run, self._settings.attempt, self._work, self._log)
        self._writer = opened.writer
        step = opened.ref.step if opened.ref else None
        self._board.set(checkpoint_step=step, resumed_from_step=step)
        self._start_board.document = peers.start_document(self._settings.attempt, opened.ref)
        return True

    def _finish_published(self, run: RunFile, store: ObjectStore, prefix: str) -> End:
        """What an earlier attempt had still to do after it had published the artifact to the output."""
        assert self._result is not None  # _begin found it
        if run.output.publish is not None:
            output_store.download_artifact(store, prefix, self._work.artifact)
        end = self._after_publishing(run, self._result)
        return End(end.outcome, end.message or "An earlier attempt had published the artifact already.", end.field)

    def _after_publishing(self, run: RunFile, result: Result) -> End:
        """The gate, and the hub's repository for a model that passes it."""
        if result.unmet is not None:
            return End(REQUIREMENT_NOT_MET, result.unmet, "spec.evaluation.require")
        if run.output.publish is not None and result.artifact != "report":
            url = publish_to_hub(run.output.publish, self._work.artifact / result.artifact, self._reach)
            self._log.info("published to the hub", url=url)
        return End(SUCCEEDED)

    def _join(self, store: ObjectStore, prefix: str) -> None:
        ref = peers.ask_node_0(
            self._settings.master,
            self._settings.master_progress_port,
            self._settings.attempt,
            wait_seconds=self._settings.peer_seconds,
        )
        output_store.restore_from(store, prefix, ref, self._work, self._log)

    def _train(self, run: RunFile) -> End:
        uploader = self._uploader(run)
        supervisor = Supervisor(
            Gang(run, self._settings), self._work, self._settings, self._stop, self._board, uploader, self._log
        )
        self._board.set(stage=Stage.LOADING)
        end = supervisor.run()
        if uploader is None or self._writer is None:
            return end
        publisher = Publisher(self._work, self._writer, uploader, supervisor, self._stop, self._board, self._log)
        if end.outcome == SUCCEEDED:
            try:
                result = self._result = publisher.publish()
                return self._stoppable(lambda: self._after_publishing(run, result))
            except OutOfTime:
                end = End(STOPPED, "Stopped on request while the artifact was being published.")
        return publisher.store_last_checkpoint(end)

    def _uploader(self, run: RunFile) -> CheckpointUploader | None:
        """The background uploader of node 0; other nodes never write to the store."""
        if self._writer is None:
            return None
        policy = CheckpointPolicy(run.world_size, run.checkpoint.keep_last, run.digest())
        uploader = CheckpointUploader(self._work, self._writer, policy, self._board, self._metrics, self._log)
        uploader.start()
        return uploader

    def _stoppable(self, action: Callable[[], T]) -> T:
        return run_until(lambda: self._stop.requested, action)

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

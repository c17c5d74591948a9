"""What the agent answers over HTTP while it runs."""

from __future__ import annotations

import http.client
import json
import urllib.error

import pytest
from prometheus_client.parser import text_string_to_metric_families

from finetune_api.documents import ProgressDocument, Stage
from finetune_api.guards import RollbackReason
from finetune_trainer.agent import peers
from finetune_trainer.agent.ending import Alarm, End
from finetune_trainer.agent.metrics import Metrics
from finetune_trainer.agent.progress import ProgressBoard
from finetune_trainer.agent.serving import AgentServer, StartBoard
from finetune_trainer.agent.workdir import WorkDir, write_whole


def metrics_of(agent) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(agent.get("/metrics").decode()):
        for sample in family.samples:
            found[sample.name + "".join(f"[{value}]" for value in sample.labels.values())] = sample.value
    return found


def test_progress_and_metrics_follow_the_workers(make_agent) -> None:
    agent = make_agent(attempt=7, does={"steps": 10_000, "save_every": 3, "step_seconds": 0.1}).start()
    agent.wait_for_event("checkpoint stored")
    agent.wait_for_step(3)  # the step is read at most a second late
    document = ProgressDocument.from_json(json.loads(agent.get("/progress")))
    assert (document.attempt, document.stage, document.total_steps) == (7, Stage.TRAINING, 10_000)
    assert document.step >= 3
    assert document.loss == pytest.approx(2.0 / (document.step + 1))
    assert document.checkpoint_step is not None and document.checkpoint_step % 3 == 0
    assert document.resumed_from_step is None
    metrics = metrics_of(agent)
    assert metrics["finetune_step"] >= document.step
    assert metrics["finetune_tokens_per_second"] == 1234.5
    assert metrics["finetune_checkpoints_uploaded_total"] >= 1
    assert metrics["finetune_checkpoint_upload_seconds_count"] >= 1
    assert (metrics["finetune_stage[Training]"], metrics["finetune_stage[Loading]"]) == (1.0, 0.0)
    assert agent.get("/healthz") == b"ok\n"
    with pytest.raises(urllib.error.HTTPError) as refused:
        agent.get("/../etc/passwd")
    assert refused.value.code == 404


def test_progress_says_loading_and_the_total_before_the_first_step(make_agent) -> None:
    agent = make_agent(does={"load_seconds": 600}).start()
    agent.wait_for_event("workers started")
    document = ProgressDocument.from_json(json.loads(agent.get("/progress")))
    assert (document.stage, document.step, document.total_steps, document.loss) == (Stage.LOADING, 0, 4, None)


def test_a_resumed_attempt_says_from_where(make_agent) -> None:
    first = make_agent(does={"steps": 10_000, "save_every": 1_000_000}).start()
    first.wait_for_step(2)
    first.stop()
    second = make_agent(attempt=1, does={"steps": 10_000}).start()
    second.wait_for_step(first.message.checkpoint_step + 1)
    document = ProgressDocument.from_json(json.loads(second.get("/progress")))
    assert document.resumed_from_step == document.checkpoint_step == first.message.checkpoint_step


@pytest.mark.parametrize("wrong", ['{"stage": "Dreaming", "step": 1, "totalSteps": 2}', "[1]", '{"step": "'])
def test_a_wrong_document_of_a_worker_changes_nothing(tmp_path, wrong) -> None:
    work, board = WorkDir(tmp_path), ProgressBoard(1)
    work.prepare()
    path = work.state / "progress.json"
    write_whole(path, '{"stage": "Training", "step": 5, "totalSteps": 9}')
    board.read_worker(work)
    write_whole(path, wrong)
    board.read_worker(work)
    assert (board.document.step, board.document.stage) == (5, Stage.TRAINING)


def test_a_worker_cannot_speak_for_the_agent(tmp_path) -> None:
    work, board = WorkDir(tmp_path), ProgressBoard(1)
    work.prepare()
    board.set(checkpoint_step=4)
    write_whole(
        work.state / "progress.json",
        '{"stage": "Training", "step": 5, "totalSteps": 9, "attempt": 99, "checkpointStep": 500}',
    )
    board.read_worker(work)
    assert (board.document.attempt, board.document.checkpoint_step, board.document.step) == (1, 4, 5)


def test_only_a_node_of_the_same_attempt_is_heard(tmp_path) -> None:
    gang = StartBoard()
    server = AgentServer("127.0.0.1", 0, ProgressBoard(4), Metrics(ProgressBoard(4)), gang)
    server.run()

    def tell(attempt: int, node: int, message: str) -> None:
        end = End("DataInvalid", message, "spec.dataset")
        peers.tell_node_0("127.0.0.1", server.port, attempt=attempt, node=node, end=end)

    tell(4, 1, "before the start")
    gang.document = {"attempt": 4}
    tell(3, 1, "of an earlier attempt")
    assert gang.ended == {}
    tell(4, 1, "the first word")
    tell(4, 1, "the second word")
    assert gang.ended == {1: End("DataInvalid", "the first word", "spec.dataset")}
    for body in (b"not json", b"[]", b'{"attempt": 4, "node": 2, "outcome": "Nonsense", "message": "", "field": null}'):
        assert not gang.hear(body)
    told = gang.explain(End("CollectiveFailed", "contact was lost"))
    assert told == End("DataInvalid", "node 1: the first word", "spec.dataset")
    own = End("OutOfGpuMemory", "this node's own end")
    assert gang.explain(own) == own


def test_what_a_guard_of_another_node_has_found_wins_over_a_stop_and_no_other_failure_does() -> None:
    gang = StartBoard()
    server = AgentServer("127.0.0.1", 0, ProgressBoard(0), Metrics(ProgressBoard(0)), gang)
    server.run()
    gang.document = {"attempt": 0}
    stopped, alarm = End("Stopped", "Stopped on request."), Alarm(RollbackReason.SPIKE, 40)
    peers.tell_node_0("127.0.0.1", server.port, attempt=0, node=1, end=End("DataInvalid", "a bad row"))
    assert gang.explain(stopped) == stopped
    spike = End("LossSpike", "too high from step 40 on", alarm=alarm)
    peers.tell_node_0("127.0.0.1", server.port, attempt=0, node=2, end=spike)
    assert gang.explain(stopped) == End("LossSpike", "node 2: too high from step 40 on", alarm=alarm)


def test_an_end_that_is_too_long_is_not_read() -> None:
    server = AgentServer("127.0.0.1", 0, ProgressBoard(0), Metrics(ProgressBoard(0)), StartBoard())
    server.run()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("POST", "/ended", headers={"Content-Length": "100000"})
    assert connection.getresponse().status == 400
    connection.close()

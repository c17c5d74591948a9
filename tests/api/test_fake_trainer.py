"""The fake trainer keeps the contract of the real agent's server."""

from __future__ import annotations

import json
from pathlib import Path

import aiohttp

from finetune_api.documents import ProgressDocument, Stage
from finetune_api.naming import PROGRESS_PORT
from finetune_operator.progress import document
from finetune_trainer.agent.metrics import Metrics
from finetune_trainer.agent.progress import ProgressBoard
from finetune_trainer.agent.serving import AgentServer, StartBoard
from finetune_trainer.agent.workdir import WorkDir
from tests.api.fake_trainer import FakeTrainers

ADDRESS = "127.200.0.1"
DOCUMENT = ProgressDocument(attempt=3, stage=Stage.TRAINING, step=420, total_steps=1000, loss=1.25, checkpoint_step=400)


async def answer(url: str) -> tuple[int, str, object]:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status, response.content_type, await response.json()


async def test_both_answer_alike_and_the_poller_reads_both(trainers: FakeTrainers, tmp_path: Path) -> None:
    board = ProgressBoard(DOCUMENT.attempt)
    work = WorkDir(tmp_path)
    work.state.mkdir(parents=True)
    (work.state / "progress.json").write_text(json.dumps(DOCUMENT.to_json()))
    board.read_worker(work)
    board.set(checkpoint_step=DOCUMENT.checkpoint_step)
    agent = AgentServer("127.0.0.1", 0, board, Metrics(board), StartBoard())
    agent.run()
    trainers.says(ADDRESS, DOCUMENT)
    real = await answer(f"http://127.0.0.1:{agent.port}/progress")
    fake = await answer(f"http://{ADDRESS}:{PROGRESS_PORT}/progress")
    assert fake == real
    async with document.open_session() as session:
        assert await document.read(session, "127.0.0.1", agent.port, attempt=3) == DOCUMENT
        assert await document.read(session, ADDRESS, PROGRESS_PORT, attempt=3) == DOCUMENT

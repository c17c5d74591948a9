"""After a failure a report in the output says what happened, how far the run was, and where each rank stood."""

from __future__ import annotations

from pathlib import Path

from finetune_api.documents import ProgressDocument, Stage
from finetune_trainer.agent.ending import End
from finetune_trainer.agent.failure_report import failure_report, stacks
from finetune_trainer.agent.kept_logs import keep_logs
from finetune_trainer.agent.redaction import Redactor
from finetune_trainer.store.local import LocalStore

SECRET = "a-secret-of-the-team"
DUMP = """\
Thread 0x00007f01 (most recent call first):
  File "queue.py", line 9 in get
Current thread 0x00007f02 (most recent call first):
  File "table.py", line 4 in read
  File "engine.py", line 8 in step
"""
TRACE = """\
Traceback (most recent call last):
  File "engine.py", line 8, in step
    self.read()
    ^^^^^^^^^^^
ValueError: no such row
"""


def test_the_report_of_a_hang_has_the_stacks_of_all_ranks(make_agent, make_run, output) -> None:
    does = {"steps": 10, "hang_step": 4, "hang_rank": 1}
    agent = make_agent(make_run(processes=2), attempt=3, does=does, arguments=("--hang-seconds", "1"))
    assert agent.execute() == 84
    report = (output / "logs" / "attempt-3" / "report.md").read_text()
    assert report.startswith("# Attempt 3 ended as Hang\n")
    assert "Rank 1 fell silent first, while reading data" in report
    for line in ("Class | Hang, exit code 84", "Stage | Training", "Step | 3 of 10", "loss | 0.5"):
        assert f"| {line} |\n" in report
    first, second = report.partition("### Rank 0\n")[2].split("### Rank 1\n")
    assert first.count(" in one_step\n") == second.count(" in one_step\n") == 1
    assert "report, beside the end of each rank's log, is in" in agent.message.message


def test_stacks_and_tracebacks_are_taken_out_of_what_a_worker_printed() -> None:
    printed = f"step 1\n  indented words\n{DUMP}step 2\n{TRACE}the end\n"
    assert stacks(printed) == (DUMP + TRACE).rstrip()
    assert stacks("step 1\nstep 2\n") == ""


def test_a_line_that_another_thread_prints_into_a_stack_cuts_nothing_off() -> None:
    lines = DUMP.splitlines()
    assert stacks("\n".join([*lines[:4], "saved", *lines[4:]])) == DUMP.rstrip()


def test_a_report_says_what_it_does_not_know() -> None:
    document = ProgressDocument(attempt=0, stage=Stage.LOADING, step=0, total_steps=8)
    report = failure_report(End("DiskFull", "line 1\nline 2"), document, {4: "words"})
    assert "    line 1\n    line 2\n" in report
    assert "| Newest stored checkpoint | none |" in report and "| Field to change | none |" in report
    assert "### Rank 4\n\nNone; rank-4.log has what it printed." in report
    assert "loss" not in report


def test_the_nodes_of_a_gang_write_reports_of_their_own_without_secrets(tmp_path: Path) -> None:
    document = ProgressDocument(attempt=2, stage=Stage.TRAINING, step=5, total_steps=8)
    for node in (0, 1):
        end, redactor = End("CollectiveFailed", f"the key {SECRET} is wrong"), Redactor({"HF_TOKEN": SECRET})
        keep_logs(LocalStore(tmp_path), "out", end, document, {node: DUMP}, redactor, node=node)
    folder = tmp_path / "out/logs/attempt-2"
    names = ["rank-0.log", "rank-1.log", "report-node-1.md", "report.md"]
    assert sorted(path.name for path in folder.iterdir()) == names
    report = (folder / "report-node-1.md").read_text()
    assert "### Rank 1\n" in report and "### Rank 0\n" not in report
    assert "the key *** is wrong" in report

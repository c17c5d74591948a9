"""The end of a run: write the artifact and its report, then say that they are complete."""

from __future__ import annotations

import json
import shutil
from typing import Any

from finetune_api.runfile import RunFile
from finetune_trainer.agent.workdir import WorkDir, write_whole
from finetune_trainer.data import Encoded
from finetune_trainer.worker import checkpoints
from finetune_trainer.worker.export import export_adapter, export_merged, export_model, gathered_state
from finetune_trainer.worker.report import Outcome, build_report
from finetune_trainer.worker.report_text import draw_curve, render_report


def publish(engine: Any, run: RunFile, data: Encoded, outcome: Outcome) -> None:
    """Write WORK/artifact, then artifact.ready and result.json. All ranks call it; rank 0 writes."""
    work: WorkDir = engine.supervision.work
    checkpoints.require_finite(engine.model)
    state = gathered_state(engine.model)
    if engine.supervision.ranks.is_main:
        shutil.rmtree(work.artifact, ignore_errors=True)
        folder, base = work.artifact / outcome.artifact, work.inputs / "model"
        if outcome.artifact == "adapter":
            export_adapter(engine.model, state, folder, run, base)
            if run.output.merge_adapter:
                export_merged(folder, work.artifact / "merged", run, base)
        else:
            export_model(engine.model, state, folder, run, base)
        _write_report(work, run, data, outcome)


def _write_report(work: WorkDir, run: RunFile, data: Encoded, outcome: Outcome) -> None:
    report = build_report(run, data, outcome)
    write_whole(work.artifact / "report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    write_whole(work.artifact / "report.md", render_report(report))
    lines = "".join(json.dumps(line, allow_nan=False) + "\n" for line in outcome.history)
    write_whole(work.artifact / "metrics.jsonl", lines)
    draw_curve(outcome.history, work.artifact / "loss.png")
    write_whole(work.root / "artifact.ready", json.dumps({"artifact": outcome.artifact}))
    write_whole(
        work.state / "result.json",
        json.dumps(
            {
                "artifact": outcome.artifact,
                "baseEvalLoss": outcome.base_eval_loss,
                "evalLoss": outcome.eval_loss,
                "step": outcome.step,
            }
        ),
    )

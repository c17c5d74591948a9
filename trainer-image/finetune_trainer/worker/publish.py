"""The end of a run: write the artifact and its report, then say that they are complete."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from typing import Any

from finetune_api.runfile import RunFile
from finetune_trainer.agent.workdir import WorkDir, write_whole
from finetune_trainer.data import Encoded
from finetune_trainer.worker import checkpoints
from finetune_trainer.worker.card import write_card
from finetune_trainer.worker.curves import draw_curves
from finetune_trainer.worker.export import LABELLED, export_adapter, export_merged, export_model, gathered_state
from finetune_trainer.worker.report import Outcome, build_report, prediction_lines
from finetune_trainer.worker.report_text import render_report


def publish(engine: Any, run: RunFile, data: Encoded, outcome: Outcome) -> None:
    """Write WORK/artifact, then artifact.ready and result.json. All ranks call it; rank 0 writes."""
    work: WorkDir = engine.supervision.work
    if engine.supervision.ranks.is_main:
        shutil.rmtree(work.artifact, ignore_errors=True)
        work.artifact.mkdir()
    if outcome.artifact != "report":
        checkpoints.require_finite(checkpoints.trained_weights(engine.model))
        _write_weights(engine, run, outcome)
    if engine.supervision.ranks.is_main:
        _write_report(work, run, data, outcome)


def _write_weights(engine: Any, run: RunFile, outcome: Outcome) -> None:
    work: WorkDir = engine.supervision.work
    state = gathered_state(engine.model)
    if not engine.supervision.ranks.is_main:
        return
    folder, objective = work.artifact / outcome.artifact, engine.objective
    labels = len(engine.model.config.id2label) if run.model.task in LABELLED else None
    written = [outcome.artifact]
    if outcome.artifact == "adapter":
        export_adapter(engine.model, state, folder, run, work)
        if run.output.merge_adapter:
            written.append("merged")
            export_merged(
                folder,
                work.artifact / "merged",
                run,
                work,
                lambda t: objective.load_model(work.inputs / "model", None, t),
            )
    else:
        export_model(engine.model, state, folder, run, work)
    for artifact in written:
        card = write_card(run, outcome.model_id, artifact, outcome.tuned.metrics, labels=labels)
        write_whole(work.artifact / artifact / "README.md", card)


def _write_report(work: WorkDir, run: RunFile, data: Encoded, outcome: Outcome) -> None:
    size = sum(path.stat().st_size for path in work.artifact.rglob("*") if path.is_file())
    report = build_report(run, data, outcome, size)
    curves = draw_curves(outcome.history, work.artifact)
    write_whole(work.artifact / "report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    write_whole(work.artifact / "report.md", render_report(report, curves))
    write_whole(work.artifact / "metrics.jsonl", _lines(outcome.history))
    write_whole(work.artifact / "predictions.jsonl", _lines(prediction_lines(outcome)))
    write_whole(work.root / "artifact.ready", json.dumps({"artifact": outcome.artifact}))
    result = {
        "artifact": outcome.artifact,
        "baseEvalLoss": outcome.base_eval_loss,
        "evalLoss": outcome.eval_loss,
        "step": outcome.step,
        "unmet": outcome.unmet,
    }
    write_whole(work.state / "result.json", json.dumps(result))


def _lines(entries: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in entries)

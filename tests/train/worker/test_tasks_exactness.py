"""Each task's gradient and evaluation are those of single records, however a step is cut into passes and ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.train.methods.case import Case, merged
from tests.train.methods.cases_tasks import CLASSES, PAIRS, TARGETS, WORDS, labelled, preferred, tagged, translated
from tests.train.worker.gradients import flat_gradient
from tests.train.worker.runs import build_engine_in, in_child, launch

SPLITS = [(1, 12, 1), (5, 3, 1), (5, 2, 2)]
TOLERANCE = 1e-6
EXACT: Mapping[str, Any] = {
    "tuning": {"type": "Full", "lora": None},
    "hyperparameters": {"totalSteps": 1, "maxGradNorm": 1000.0},
    "dataset": {"validationFraction": 0.25},
}
_WIDE = {"spread": 0.1}
CASES = {
    "classification": Case("", {"family": "llama", **_WIDE}, labelled(16), merged(CLASSES, EXACT)),
    "classification-encoder": Case("", {"family": "bert", **_WIDE}, labelled(16), merged(CLASSES, EXACT)),
    "tags": Case("", {"family": "bert", **_WIDE}, tagged(16), merged(WORDS, EXACT)),
    "seq2seq": Case("", {"family": "t5"}, translated(16), merged(TARGETS, EXACT)),
    "reward": Case("", {"family": "llama", **_WIDE}, preferred(16), merged(PAIRS, EXACT)),
}


def _prepared(case: Case, root: Path, micro: int, accumulation: int, ranks: int) -> Path:
    changes = {
        "hyperparameters": {"microBatchSize": micro, "gradientAccumulation": accumulation},
        "resources": {"processesPerNode": ranks},
    }
    work = case.work(root, changes)
    path = root / "inputs/model/config.json"
    config = json.loads(path.read_text())
    still = {name: 0.0 for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")}
    path.write_text(json.dumps({**config, **still}))
    (root / "run.json").write_text(json.dumps(work.run.to_json()))
    return root


@pytest.mark.parametrize("name", CASES)
def test_every_split_gives_the_gradient_and_the_metrics_of_single_records(tmp_path: Path, name: str) -> None:
    reference: tuple[Any, dict[str, float]] | None = None
    for micro, accumulation, ranks in SPLITS:
        root = _prepared(CASES[name], tmp_path / f"{micro}-{accumulation}-{ranks}", micro, accumulation, ranks)
        assert launch(_save, ranks, str(root)) == [0] * ranks
        if reference is None:
            reference = in_child(_by_single_records, str(root))
        gradient, metrics = reference
        found = np.load(root / "gradient-0.npy")
        assert np.linalg.norm(found - gradient) / np.linalg.norm(gradient) <= TOLERANCE
        for rank in range(ranks):
            assert json.loads((root / f"metrics-{rank}.json").read_text()) == pytest.approx(metrics, rel=1e-5)


def _save(root: str, env: dict[str, str]) -> int:
    """The first step's gradient, the weights that it is of, and the metrics before it."""
    from safetensors.torch import save_file
    from transformers import TrainerCallback

    engine = build_engine_in(root)
    metrics = {key.removeprefix("eval_"): value for key, value in engine.evaluate().items()}
    kept = ("loss", "accuracy", "precision", "recall", "f1", "tokenAccuracy", "rewardMargin")
    Path(f"{root}/metrics-{env['RANK']}.json").write_text(json.dumps({k: metrics[k] for k in kept if k in metrics}))
    state = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    save_file(state, f"{root}/weights-{env['RANK']}.safetensors")

    class Save(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            np.save(f"{root}/gradient-{env['RANK']}.npy", flat_gradient(engine.model))

    engine.add_callback(Save())
    engine.train()
    return 0


def _by_single_records(root: str) -> tuple[Any, dict[str, float]]:
    """By plain torch, one record at a time and without padding: sum of losses over the number of units."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    from finetune_api.runfile import RunFile
    from finetune_trainer.data import load_dataset

    folder = Path(root)
    run = RunFile.from_json(json.loads((folder / "run.json").read_text()))
    data = load_dataset(run, folder / "inputs", AutoTokenizer.from_pretrained(folder / "inputs/model"))
    assert (len(data.train), len(data.validation)) == (12, 4)
    key = run.objective.type.value if run.objective.type.value == "Reward" else run.model.task.value
    loaded, loss = _PLAIN[key]
    model = loaded(folder / "inputs/model", data.labels)
    model.load_state_dict(load_file(folder / "weights-0.safetensors"))
    model.eval()

    pairs = [loss(model, item) for item in data.train]
    (sum(total for total, _, _ in pairs) / sum(units for _, units, _ in pairs)).backward()
    gradient = flat_gradient(model)
    with torch.no_grad():
        held_out = [loss(model, item) for item in data.validation]
    metrics = _METRICS[key]([outcome for *_, outcome in held_out], data.labels)
    units = sum(units for _, units, _ in held_out)
    return gradient, {"loss": float(sum(total for total, _, _ in held_out)) / units, **metrics}


def _ids(array: Any) -> Any:
    import torch

    return torch.from_numpy(array.astype("int64"))[None]


def _classifier(folder: Path, labels: tuple[str, ...]) -> Any:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(labels) or 1)
    model.config.pad_token_id = None  # one row needs no padding: the last token counts
    return model


def _tagger(folder: Path, labels: tuple[str, ...]) -> Any:
    from transformers import AutoModelForTokenClassification

    return AutoModelForTokenClassification.from_pretrained(folder, num_labels=len(labels))


def _writer(folder: Path, labels: tuple[str, ...]) -> Any:
    from transformers import AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM.from_pretrained(folder)


def _class_loss(model: Any, item: Any) -> tuple[Any, int, Any]:
    logs = model(input_ids=_ids(item.input_ids)).logits[0].log_softmax(-1)
    return -logs[item.label], 1, (item.label, int(logs.argmax()))


def _tag_loss(model: Any, item: Any) -> tuple[Any, int, Any]:
    logs = model(input_ids=_ids(item.input_ids)).logits[0].log_softmax(-1)
    labels = _ids(item.labels)[0]
    kept = labels != -100
    return -logs[kept, labels[kept]].sum(), int(kept.sum()), (labels[kept].tolist(), logs[kept].argmax(-1).tolist())


def _target_loss(model: Any, item: Any) -> tuple[Any, int, Any]:
    import torch

    labels = _ids(item.labels)
    start = torch.tensor([[model.config.decoder_start_token_id]])
    shifted = torch.cat([start, labels[:, :-1]], dim=1)
    logs = model(input_ids=_ids(item.input_ids), decoder_input_ids=shifted).logits[0].log_softmax(-1)
    places = torch.arange(labels.shape[1])
    return -logs[places, labels[0]].sum(), labels.shape[1], (labels[0].tolist(), logs.argmax(-1).tolist())


def _pair_loss(model: Any, item: Any) -> tuple[Any, int, Any]:
    import torch

    chosen, rejected = (model(input_ids=_ids(ids)).logits[0, 0] for ids in (item.chosen_ids, item.rejected_ids))
    return -torch.log(torch.sigmoid(chosen - rejected)), 1, float(chosen - rejected)


def _class_metrics(outcomes: list[Any], labels: tuple[str, ...]) -> dict[str, float]:
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    actual, predicted = zip(*outcomes, strict=True)
    precision, recall, f1, _ = precision_recall_fscore_support(actual, predicted, average="binary", zero_division=0)
    return {"accuracy": accuracy_score(actual, predicted), "precision": precision, "recall": recall, "f1": f1}


def _tag_metrics(outcomes: list[Any], labels: tuple[str, ...]) -> dict[str, float]:
    from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score

    actual, predicted = ([[labels[k] for k in row[side]] for row in outcomes] for side in (0, 1))
    scores = {"accuracy": accuracy_score, "precision": precision_score, "recall": recall_score, "f1": f1_score}
    return {name: float(score(actual, predicted)) for name, score in scores.items()}


def _token_metrics(outcomes: list[Any], labels: tuple[str, ...]) -> dict[str, float]:
    pairs = [pair for actual, predicted in outcomes for pair in zip(actual, predicted, strict=True)]
    return {"tokenAccuracy": sum(a == p for a, p in pairs) / len(pairs)}


def _pair_metrics(outcomes: list[Any], labels: tuple[str, ...]) -> dict[str, float]:
    return {"accuracy": sum(m > 0 for m in outcomes) / len(outcomes), "rewardMargin": sum(outcomes) / len(outcomes)}


_PLAIN: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "SequenceClassification": (_classifier, _class_loss),
    "TokenClassification": (_tagger, _tag_loss),
    "Seq2Seq": (_writer, _target_loss),
    "Reward": (_classifier, _pair_loss),
}
_METRICS: dict[str, Callable[..., dict[str, float]]] = {
    "SequenceClassification": _class_metrics,
    "TokenClassification": _tag_metrics,
    "Seq2Seq": _token_metrics,
    "Reward": _pair_metrics,
}

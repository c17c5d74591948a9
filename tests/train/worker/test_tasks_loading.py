"""Heads: kept where the base has them, made the same everywhere where it lacks them, and nothing lost in silence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.train.worker.runs import NF4, in_child, run_document

CAUSAL = ("llama", "gpt2", "gpt_neox", "qwen2", "falcon", "bloom", "opt", "mixtral", "qwen2_moe", "qwen3_moe")
NAMES = ("neg", "neutral", "pos")


def _head(kind: str) -> Any:
    from finetune_trainer.worker import heads

    return {
        "sequence": heads.SEQUENCE_CLASSIFICATION_HEAD,
        "token": heads.TOKEN_CLASSIFICATION_HEAD,
        "reward": heads.REWARD_HEAD,
        "masked": heads.MASKED_HEAD,
        "seq2seq": heads.SEQ2SEQ_HEAD,
        "causal": heads.CAUSAL_HEAD,
    }[kind]


def _load(folder: Path, kind: str, labels: tuple[str, ...] = (), seed: int = 7, **changes: Any) -> Any:
    """The loaded base, with changes merged into the run document."""
    import torch

    from finetune_api.runfile import RunFile
    from finetune_trainer.worker.loading import load_base
    from tests.train.methods.case import merged

    document = merged(merged(run_document(), {"hyperparameters": {"seed": seed}}), changes)
    torch.manual_seed(torch.seed())  # what was drawn before must not matter
    return load_base(folder, RunFile.from_json(document), head=_head(kind), labels=labels, pad_id=2)


def _refused(folder: Path, kind: str, labels: tuple[str, ...] = (), **changes: Any) -> tuple[str, str | None]:
    from finetune_api.failures import FinetuneError

    try:
        _load(folder, kind, labels, **changes)
    except FinetuneError as error:
        return error.failure_class, str(error)
    return "", None


def _weights(model: Any) -> dict[str, list[float]]:
    return {name: tensor.flatten().tolist() for name, tensor in model.state_dict().items()}


# ---- new heads


@pytest.fixture(scope="module")
def causal_heads() -> Any:
    return in_child(_causal_heads)


def _causal_heads() -> dict[tuple[str, str], Any]:
    from finetune_trainer.worker.heads import fresh_modules
    from tests.train.models import tiny_model

    found = {}
    for family in CAUSAL:
        for kind in ("sequence", "token", "reward"):
            if (family, kind) == ("opt", "token"):
                continue  # the library has no such model
            model = _load(tiny_model(family), kind, NAMES if kind != "reward" else ())
            config = model.config
            found[(family, kind)] = (
                fresh_modules(model),
                config.num_labels,
                config.id2label,
                config.problem_type,
                config.pad_token_id,
            )
    return found


def test_causal_bases_get_a_head_of_the_data_s_labels(causal_heads: Any) -> None:
    named = dict(enumerate(NAMES))
    for (family, kind), (fresh, outputs, labels, problem, pad) in causal_heads.items():
        assert fresh == ("classifier" if "classifier" in fresh else "score",), family
        assert pad == 2
        if kind == "reward":
            assert (outputs, labels, problem) == (1, {0: "LABEL_0"}, "regression"), family
        else:
            expected = "single_label_classification" if kind == "sequence" else None
            assert (outputs, labels, problem) == (3, named, expected), family


def test_bert_gets_a_head_and_a_pooler_and_both_are_named() -> None:
    sequence, token, masked = in_child(_bert)
    assert sequence == ("bert.pooler.dense", "classifier"), "an adapter has to save the pooler too"
    assert token == ("classifier",)
    assert masked == ()


def _bert() -> list[Any]:
    from finetune_trainer.worker.heads import fresh_modules
    from tests.train.models import tiny_model

    folder = tiny_model("bert")
    return [fresh_modules(_load(folder, kind, NAMES)) for kind in ("sequence", "token", "masked")]


def test_a_fresh_head_depends_on_the_seed_only() -> None:
    first, again, other, spread = in_child(_fresh_twice)
    assert first == again
    names = {"classifier.weight", "bert.pooler.dense.weight"}
    assert {name for name in first if first[name] != other[name]} == names
    assert first["classifier.bias"] == [0.0, 0.0, 0.0]
    assert spread == pytest.approx(0.02, rel=0.1), "the architecture's own initializer_range"


def _fresh_twice() -> tuple[Any, Any, Any, float]:
    from tests.train.models import tiny_model

    folder = tiny_model("bert")
    models = [_load(folder, "sequence", NAMES, seed=seed) for seed in (7, 7, 8)]
    spread = float(models[0].bert.pooler.dense.weight.std())
    return *(_weights(model) for model in models), spread


# ---- heads that the base has


def test_a_matching_head_is_kept_and_another_is_made_anew(tmp_path: Path) -> None:
    found = in_child(_kept, str(tmp_path / "trained"))
    assert found["same names"] == ((), 0.0, NAMES)
    assert found["unnamed"] == ((), 0.0, ("0", "1", "2"))
    fresh, difference, labels = found["other names"]
    assert fresh == ("classifier",) and difference > 0.01 and labels == ("a", "b", "c")
    fresh, difference, labels = found["other task"]
    assert fresh == ("classifier",) and difference > 0.01 and labels == NAMES
    fresh, _, labels = found["other count"]
    assert fresh == ("classifier",) and labels == ("a", "b")


def _kept(root: str) -> dict[str, Any]:
    import torch

    from finetune_trainer.worker.heads import fresh_modules
    from tests.train.models import tiny_model

    trained = Path(root)
    model = _load(tiny_model("bert"), "sequence", NAMES)
    with torch.no_grad():
        model.classifier.weight.fill_(0.5)
    model.save_pretrained(trained)
    unnamed = trained.parent / "unnamed"
    shutil.copytree(trained, unnamed)
    config = json.loads((unnamed / "config.json").read_text())
    config["id2label"] = {str(k): f"LABEL_{k}" for k in range(3)}
    config["label2id"] = {f"LABEL_{k}": k for k in range(3)}
    (unnamed / "config.json").write_text(json.dumps(config))

    found = {}
    for name, folder, kind, labels in (
        ("same names", trained, "sequence", NAMES),
        ("unnamed", unnamed, "sequence", ("0", "1", "2")),
        ("other names", trained, "sequence", ("a", "b", "c")),
        ("other task", trained, "token", NAMES),
        ("other count", trained, "sequence", ("a", "b")),
    ):
        again = _load(folder, kind, labels)
        difference = float((again.classifier.weight - 0.5).abs().max())
        found[name] = (fresh_modules(again), difference, tuple(again.config.label2id))
    return found


# ---- what is refused


def test_only_named_weights_may_be_missing_or_left_over(tmp_path: Path) -> None:
    found = in_child(_damaged, str(tmp_path))
    assert found["missing in the body"][0] == "ModelUnsupported"
    assert "lack 1 weights: model.layers.1.mlp.up_proj.weight" in found["missing in the body"][1]
    assert "do not know" not in found["unknown"][1]
    assert "have, but the architecture does not know, 1 weights: model.extra.weight" in found["unknown"][1]
    assert "have in another shape 1 weights: model.norm.weight" in found["misshapen"][1]
    assert "lack 1 weights: lm_head.weight" in found["causal without its head"][1]
    assert "sequence-to-sequence" in found["t5"][1]
    assert "nothing to evaluate" in found["evaluation"][1]


def _damaged(root: str) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file, save_file

    from tests.train.models import tiny_model

    def changed(name: str, change: Any) -> Path:
        folder = Path(root) / name
        shutil.copytree(tiny_model("llama"), folder)
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    missing = changed("missing", lambda s: s.pop("model.layers.1.mlp.up_proj.weight"))
    unknown = changed("unknown", lambda s: s.update({"model.extra.weight": torch.zeros(2)}))
    misshapen = changed("misshapen", lambda s: s.update({"model.norm.weight": torch.zeros(7)}))
    headless = changed("headless", lambda s: s.pop("lm_head.weight"))
    return {
        "missing in the body": _refused(missing, "sequence", NAMES),
        "unknown": _refused(unknown, "sequence", NAMES),
        "misshapen": _refused(misshapen, "sequence", NAMES),
        "causal without its head": _refused(headless, "causal"),
        "t5": _refused(tiny_model("t5"), "sequence", NAMES),
        "evaluation": _refused(
            tiny_model("bert"),
            "sequence",
            NAMES,
            objective={"type": "Evaluation"},
            tuning={"type": "Full", "lora": None},
        ),
    }


def test_weights_of_a_head_that_is_not_used_are_logged() -> None:
    (line,) = [json.loads(line) for line in in_child(_log_of_a_load).splitlines()]
    assert {"event": "weights-dropped", "names": ["lm_head.weight"], "count": 1}.items() <= line.items()


def _log_of_a_load() -> str:
    import io
    from contextlib import redirect_stdout

    from tests.train.models import tiny_model

    folder = tiny_model("llama")
    with redirect_stdout(io.StringIO()) as printed:
        _load(folder, "sequence", NAMES)
    return printed.getvalue()


# ---- quantised bases


def test_heads_and_poolers_are_never_quantised() -> None:
    for quantised in in_child(_quantised):
        assert len(quantised) > 10
        assert not [name for name in quantised if "pooler" in name or "classifier" in name or "score" in name]


def _quantised() -> list[list[str]]:
    from tests.train.models import tiny_model

    tuning = {"type": "QLoRA", "quantization": NF4}
    found = []
    for family, kind in (("bert", "sequence"), ("llama", "token"), ("llama", "reward")):
        model = _load(tiny_model(family, width=64), kind, NAMES, tuning=tuning, hyperparameters={"precision": "BF16"})
        found.append([name for name, p in model.named_parameters() if hasattr(p, "quant_state")])
    return found

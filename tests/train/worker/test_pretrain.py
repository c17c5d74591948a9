"""Pretraining: from a config alone, with the tokenizer of the text, resumed to the bit, loaded by the stock library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.methods.case import Case
from tests.train.methods.cases_pretrain import CASES, FULL, pretrain, text_run
from tests.train.methods.novel import novel
from tests.train.worker.runs import Work, in_child, launch

BY_NAME = {case.name: case for case in CASES}
CHARACTER, BYTE_PAIRS = BY_NAME["pretrain-character"], BY_NAME["pretrain-byte-pairs"]


def _without_weights(work: Work) -> Work:
    """A base of a config and the generation settings of another vocabulary: no weights, no tokenizer."""
    folder = work.root / "inputs/model"
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 50256, "bos_token_id": 50256}))
    return work


def _written(work: Work) -> Work:
    (work.root / "run.json").write_text(json.dumps(work.run.to_json()))
    return work


@pytest.mark.parametrize("name", ["pretrain-character", "pretrain-byte-pairs"])
def test_a_model_from_a_config_alone_loads_with_the_stock_library(tmp_path: Path, name: str) -> None:
    work = _without_weights(BY_NAME[name].work(tmp_path / "w"))
    assert work.train() == [0], work.logged()
    found = in_child(_loaded, str(work.root / "artifact/model"))
    assert found["rows"] == found["vocabulary"] == found["tokens"], "the config's vocabulary follows the tokenizer"
    assert found["eos"] == found["config_eos"] == found["generation_eos"]
    assert found["text"] == "CHAPTER 1\n\nAt noon the captain", "what is read is what was written"
    assert found["loss"] == pytest.approx(found["loss_again"])
    assert found["end"] == "<|endoftext|>"


def _loaded(folder: str) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("CHAPTER 1\n\nAt noon the captain", return_tensors="pt").input_ids
    with torch.no_grad():
        losses = [float(model(input_ids=ids, labels=ids).loss) for _ in range(2)]
    return {
        "rows": model.get_input_embeddings().weight.shape[0],
        "vocabulary": model.config.vocab_size,
        "tokens": len(tokenizer),
        "eos": tokenizer.eos_token_id,
        "config_eos": model.config.eos_token_id,
        "generation_eos": model.generation_config.eos_token_id,
        "text": tokenizer.decode(ids[0]),
        "loss": losses[0],
        "loss_again": losses[1],
        "end": tokenizer.eos_token,
    }


@pytest.mark.parametrize("name", ["pretrain-character", "masked-text", "span-corruption-switch"])
def test_a_resumed_run_on_drawn_text_repeats_the_uninterrupted_one_to_the_bit(tmp_path: Path, name: str) -> None:
    case = BY_NAME[name]
    # More than one epoch, and the checkpoint lies in the middle of the second.
    settings = {"totalSteps": 9, "microBatchSize": 4, "gradientAccumulation": 2, "learningRate": 1e-3}
    whole = case.work(tmp_path / "whole", {"hyperparameters": settings, "checkpoint": {"everySteps": 7}})
    assert whole.train() == [0], whole.logged()
    resumed = whole.resumed_from(whole, 7, tmp_path / "resumed")
    assert resumed.train() == [0], resumed.logged()
    last = "checkpoints/step-9"
    assert resumed.losses(last) == whole.losses(last)
    assert len(whole.losses(last)) == 9
    assert in_child(_same_weights, str(whole.root), str(resumed.root))
    assert resumed.read("artifact/report.json")["evaluation"] == whole.read("artifact/report.json")["evaluation"]
    epochs = [line["epoch"] for line in whole.metrics() if "loss" in line]
    assert epochs[6] > 1, "step 7 lies beyond the first epoch"
    assert epochs[6] != round(epochs[6])


def _same_weights(first: str, second: str) -> bool:
    import torch
    from safetensors.torch import load_file

    found = [load_file(Path(root) / "artifact/model/model.safetensors") for root in (first, second)]
    return found[0].keys() == found[1].keys() and all(torch.equal(found[0][k], found[1][k]) for k in found[0])


def test_the_start_depends_on_the_seed_only_and_is_the_same_on_every_rank(tmp_path: Path) -> None:
    roots = []
    for number, seed in enumerate((7, 7, 8)):
        work = CHARACTER.work(
            tmp_path / str(number), {"hyperparameters": {"seed": seed}, "resources": {"processesPerNode": 2}}
        )
        assert launch(_save_start, 2, str(_written(work).root)) == [0, 0]
        roots.append(work.root)
    first, again, other = ([(root / f"start-{rank}").read_text() for rank in (0, 1)] for root in roots)
    assert first[0] == first[1] == again[0]
    assert first[0] != other[0]


def _save_start(root: str, env: dict[str, str]) -> int:
    import hashlib

    from tests.train.worker.runs import build_engine_in

    engine = build_engine_in(root)
    digest = hashlib.sha256()
    for name, tensor in sorted(engine.model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    (Path(root) / f"start-{env['RANK']}").write_text(digest.hexdigest())
    return 0


@pytest.mark.slow
def test_random_weights_are_the_same_sharded_by_zero_3(tmp_path: Path) -> None:
    plain = BYTE_PAIRS.work(tmp_path / "plain", {"hyperparameters": {"totalSteps": 2}})
    assert plain.train() == [0], plain.logged()
    sharded = BYTE_PAIRS.work(
        tmp_path / "sharded",
        {
            "hyperparameters": {"totalSteps": 2, "microBatchSize": 1, "zeroStage": 3},
            "resources": {"processesPerNode": 2},
        },
    )
    assert sharded.train() == [0, 0], sharded.logged()
    found = [[line["loss"] for line in work.metrics() if "loss" in line] for work in (plain, sharded)]
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_a_tokenizer_learnt_twice_is_the_same_to_the_byte(tmp_path: Path) -> None:
    files = []
    for number in range(2):
        work = _written(BYTE_PAIRS.work(tmp_path / str(number)))
        in_child(_learn, str(work.root))
        files.append((work.root / "cache/tokenizer/tokenizer.json").read_bytes())
    assert files[0] == files[1]


def _learn(root: str) -> None:
    from finetune_api.runfile import RunFile
    from finetune_trainer.agent.workdir import WorkDir
    from finetune_trainer.worker.tokenizers import prepare_tokenizer

    work = WorkDir(Path(root))
    prepare_tokenizer(RunFile.from_json(json.loads((work.root / "run.json").read_text())), work)


def test_a_character_tokenizer_knows_each_character_once(tmp_path: Path) -> None:
    text = "né 🙂\n\tA b"
    work = CHARACTER.work(tmp_path / "w", rows=[{"text": text * 40}])
    in_child(_learn, str(_written(work).root))
    vocabulary = json.loads((work.root / "cache/tokenizer/tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(vocabulary, key=vocabulary.__getitem__) == ["<|pad|>", "<|endoftext|>", "<|unk|>", *sorted(set(text))]


def test_a_byte_pair_vocabulary_without_room_for_the_bytes_is_refused(tmp_path: Path) -> None:
    objective = pretrain(tokenizer="BytePair", vocabularySize=100)
    error = _refusal(BYTE_PAIRS.work(tmp_path / "w", {"objective": objective}))
    assert (error["class"], error["field"]) == ("InvalidSpec", "spec.objective.pretrain.vocabularySize")
    assert "Give it at least 259" in error["message"]


def test_blocks_longer_than_the_models_positions_are_refused(tmp_path: Path) -> None:
    error = _refusal(BYTE_PAIRS.work(tmp_path / "w", {"objective": {"pretrain": {"blockSize": 256}}}))
    assert (error["class"], error["field"]) == ("InvalidSpec", "spec.objective.pretrain.blockSize")
    assert "more than the 128 positions" in error["message"]


def test_span_corruption_without_sentinels_is_refused_with_the_way_to_mend_it(tmp_path: Path) -> None:
    case = BY_NAME["span-corruption-switch"]
    error = _refusal(case.work(tmp_path / "w", {"model": {"addSpecialTokens": ["<extra_id_0>"]}}))
    assert (error["class"], error["field"]) == ("InvalidSpec", "spec.model.tokenizer.addSpecialTokens")
    assert "Add <extra_id_1> to <extra_id_3> in model.tokenizer.addSpecialTokens" in error["message"]


def test_a_masked_model_without_a_mask_token_is_refused(tmp_path: Path) -> None:
    work = BY_NAME["masked-text"].work(tmp_path / "w")
    path = work.root / "inputs/model/tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["mask_token"]
    path.write_text(json.dumps(config))
    error = _refusal(work)
    assert (error["class"], error["field"]) == ("ModelUnsupported", "spec.model.task")
    assert "has no mask token" in error["message"]


def _refusal(work: Work) -> dict[str, Any]:
    assert work.train() != [0]
    return work.read("state/error-0.json")


def test_a_sample_of_500_characters_stands_among_the_answers(tmp_path: Path) -> None:
    # Among the likeliest characters, so that the end token, which the text has once, is none of them.
    evaluation = {"probes": ["CHAPTER"], "generation": {"maxNewTokens": 500, "doSample": True, "topK": 5}}
    work = CHARACTER.work(
        tmp_path / "w", {"evaluation": evaluation, "hyperparameters": {"totalSteps": 4, "learningRate": 1e-2}}
    )
    shipped = json.loads((Path(__file__).parents[3] / "examples/configs/character-gpt/config.json").read_text())
    config = work.root / "inputs/model/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "n_positions": shipped["n_positions"]}))
    assert work.train() == [0], work.logged()
    found = work.read("artifact/report.json")["probes"]
    assert len(found) == 1
    assert shipped["n_positions"] == 256
    assert 480 < len(found[0]["tuned"]) <= 500, "blanks at its ends are no part of an answer"
    assert found[0]["tuned"] != found[0]["base"], "sampled from other weights"


def test_a_novel_in_a_text_file_keeps_its_lines_and_holds_out_its_end(tmp_path: Path) -> None:
    work = CHARACTER.work(tmp_path / "w")
    text = "".join(row["text"] for row in novel())
    (work.root / "inputs/data/0/train.jsonl").unlink()
    (work.root / "inputs/data/0/novel.txt").write_text(text)
    train, held_out, end = in_child(_texts, str(_written(work).root))
    whole = text.strip()
    border = len(whole) - round(len(whole) * 0.1)
    assert train == whole[:border] + end
    assert held_out == whole[border:] + end


def _texts(root: str) -> tuple[str, str, str]:
    from tests.train.worker.runs import build_engine_in

    engine = build_engine_in(root)
    tokenizer = engine.objective.tokenizer
    windows, blocks = engine._records, engine._held_out
    stream = windows._stream
    found = [stream.read(0, len(stream)), [token for block in blocks for token in block.input_ids]]
    return tokenizer.decode(found[0]), tokenizer.decode(found[1]), tokenizer.eos_token


def test_packed_text_loses_no_token_and_ends_each_document(tmp_path: Path) -> None:
    rows = [{"text": f"document {number} " + "x" * number} for number in range(20)]
    case = Case("x", {}, rows, text_run("CausalLM", pretrain(blockSize=24)) | {"tuning": FULL})
    work = _written(case.work(tmp_path / "w", {"dataset": {"validationFraction": None}}))
    texts, lengths = in_child(_packed, str(work.root))
    assert texts == [row["text"] for row in rows]
    assert set(lengths[:-1]) == {24}


def _packed(root: str) -> tuple[list[str], list[int]]:
    from tests.train.worker.runs import build_engine_in

    engine = build_engine_in(root)
    tokenizer = engine.objective.tokenizer
    stream = [int(token) for block in engine._records for token in block.input_ids]
    texts, document = [], []
    for token in stream:
        if token == tokenizer.eos_token_id:
            texts.append(tokenizer.decode(document))
            document = []
        else:
            document.append(token)
    assert not document
    return texts, [len(block.input_ids) for block in engine._records]

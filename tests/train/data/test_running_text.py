"""A supervised causal model goes on with a novel: preflight, plan and data read it as one text in full blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune_api.job import FineTuneJobSpec
from finetune_api.planner import build_references, preflight_file
from finetune_api.runfile import InputKind
from finetune_trainer.data import load_dataset
from finetune_trainer.data.kinds import EncodedExample
from tests.train.data.making import make_tokenizer
from tests.train.preflight.local import Folder, faults, remarks, told
from tests.unit.api import values

BLOCK = 32
NOVEL = (
    "CHAPTER 1\n\n" + "".join(f"Line {number} of the novel.\n  It went on.\n\n" for number in range(160)) + "The end."
)
JOB: dict[str, Any] = {
    "dataset": {"format": "Text", "validation": {"fraction": 0.1}},
    "objective": {"type": "Supervised", "pretrain": {"blockSize": BLOCK}},
    "tuning": {"type": "Full"},
    "hyperparameters": {"epochs": 2, "globalBatchSize": 4},
}


def settings(spec: FineTuneJobSpec) -> dict[str, Any]:
    """What the plan tells preflight of how the data is read."""
    file = preflight_file(spec, values.JOB, build_references(spec)).to_json()
    names = ("objective", "tuning", "format", "joinsText", "validationFraction")
    return {name: file[name] for name in names if name in file}


def novel(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path)
    (tmp_path / "train/rows.jsonl").unlink()
    (tmp_path / "train/novel.txt").write_text(NOVEL)
    return folder


def tokens(blocks: Sequence[EncodedExample]) -> list[int]:
    return [token for block in blocks for token in block.input_ids.tolist()]


def test_a_novel_is_counted_planned_and_read_in_the_same_full_blocks(tmp_path: Path) -> None:
    spec = values.spec(**JOB)
    found = novel(tmp_path).check(**settings(spec))
    assert faults(found) == [] and found.data is not None and "are cut" not in remarks(found)
    tokenizer = make_tokenizer()
    whole = [*tokenizer(NOVEL).input_ids, tokenizer.eos_token_id]
    assert (found.data.rows, found.data.tokens, found.data.longest_tokens) == (1, len(whole), len(whole))
    run = values.plan(spec, model=values.small_model(), data=found.data).run
    assert run.hyperparameters.max_sequence_length == BLOCK
    (tmp_path / "inputs/data").mkdir(parents=True)
    (tmp_path / "train").rename(tmp_path / "inputs/data/0")
    data = load_dataset(run, tmp_path / "inputs", tokenizer)
    lengths = [len(block.input_ids) for block in data.train]
    assert lengths[:-1] == [BLOCK] * (len(lengths) - 1) and len(lengths) > 10
    assert run.hyperparameters.total_steps == math.ceil(len(lengths) / 4 * 2)
    ends = [tokenizer.eos_token_id]
    assert tokens(data.train).count(*ends) == tokens(data.validation).count(*ends) == 1, "no end after a line"
    train, held_out = (tokenizer.decode(tokens(part)[:-1]) for part in (data.train, data.validation))
    assert train + held_out == NOVEL
    assert len(held_out) == round(0.1 * len(NOVEL)), "its end is held out"
    assert data.stats.cut == 0


def test_it_starts_from_the_weights_of_the_model() -> None:
    run = values.plan(values.spec(**JOB), model=values.small_model(), data=values.data_facts(1, format="Text")).run
    assert (run.inputs()[0].folder, run.inputs()[0].kind) == ("model", InputKind.MODEL)
    assert run.hyperparameters.learning_rate == 2e-5, "small, because the weights know something"


def test_a_single_text_is_split_even_where_nothing_is_said() -> None:
    spec = values.spec(**{**JOB, "dataset": {"validation": None}})
    run = values.plan(spec, model=values.small_model(), data=values.data_facts(1, format="Text")).run
    assert run.dataset.validation_fraction == 0.1


def test_without_a_block_size_each_line_is_a_record(tmp_path: Path) -> None:
    spec = values.spec(**{**JOB, "objective": {"type": "Supervised"}})
    found = novel(tmp_path).check(**settings(spec))
    assert found.data is not None and found.data.rows == sum(1 for line in NOVEL.splitlines() if line)


def test_documents_of_other_files_are_joined_with_their_ends(tmp_path: Path) -> None:
    spec = values.spec(**JOB)
    folder = Folder(tmp_path)
    folder.put("train", [{"text": f"Document {number}."} for number in range(30)])
    found = folder.check(**settings(spec))
    assert found.data is not None and found.data.rows == 30
    run = values.plan(spec, model=values.small_model(), data=found.data).run
    (tmp_path / "inputs/data").mkdir(parents=True)
    (tmp_path / "train").rename(tmp_path / "inputs/data/0")
    data = load_dataset(run, tmp_path / "inputs", make_tokenizer())
    text = make_tokenizer().decode(tokens(data.train))
    assert text.startswith("Document 0.</s>Document 1.</s>") and len(data.train[0].input_ids) == BLOCK


def test_answers_cannot_be_joined(tmp_path: Path) -> None:
    spec = values.spec(**{**JOB, "dataset": {"validation": {"fraction": 0.1}}})
    result = Folder(tmp_path).check(**settings(spec))
    assert told(result) == [("DataInvalid", "spec.dataset.columns")]
    assert "running text (objective Pretrain or pretrain.blockSize) needs Text (text)" in faults(result)[0].message

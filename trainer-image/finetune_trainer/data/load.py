"""From the files of a run to encoded examples: `load_dataset` is the main flow.

The first process of a node that comes here reads and encodes everything to tables on disk (prepare.py); the others,
and later attempts on the same disk, map what it wrote. No process holds the data in memory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api.runfile import RunFile
from finetune_trainer.data.cache import Beat, made_once
from finetune_trainer.data.noise import trained_view
from finetune_trainer.data.packing import Isolation
from finetune_trainer.data.prepare import INDEX, Preparation, cache_key, sources_of
from finetune_trainer.data.prepared import DataStats, HeldOutPrompt
from finetune_trainer.data.split import TEST, TRAIN, VALIDATION, mix
from finetune_trainer.data.table import Picked, Table
from finetune_trainer.data.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Encoded:
    """The data of a run. sample: the first record as text with the loss between ⟦ and ⟧, to be printed at start.

    train, validation and test are read from disk as they are used; validation and test are empty where none was asked
    for. labels: the names of classes or tags, in the order of their numbers. test: held out for the end only.
    isolation: train has EncodedPacked, whose records are kept apart in this way.
    """

    train: Sequence[Any]
    validation: Sequence[Any]
    held_out_prompts: list[HeldOutPrompt]
    stats: DataStats
    sample: str
    labels: tuple[str, ...] = ()
    test: Sequence[Any] = ()
    isolation: Isolation | None = None


def load_dataset(
    run: RunFile,
    inputs: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    cache: Path | None = None,
    beat: Beat = lambda: None,
) -> Encoded:
    """The encoded data of a run: the same on every process and in every attempt.

    inputs: holds `data/<i>` for source i, and `validation` and `test` for sources of their own. cache: where tables are
    kept, beside inputs when None. beat: called as the work goes on. Raises FinetuneError: DataInvalid for data that is
    empty or has more unusable records than are allowed, InvalidSpec for settings that do not fit it.
    """
    text_tokenizer = TextTokenizer.from_transformers(tokenizer)
    folder = (cache or inputs.parent / "cache" / "data") / cache_key(run, inputs, text_tokenizer)

    def make(partial: Path, go_on: Beat) -> None:
        Preparation(run, inputs, text_tokenizer, partial, go_on).make()

    made_once(folder, make, beat)
    return _read(run, folder, tokenizer)


def _read(run: RunFile, folder: Path, tokenizer: PreTrainedTokenizerFast) -> Encoded:
    """What is in a complete cache."""
    index = json.loads((folder / INDEX).read_text())
    sources = run.dataset.sources
    tables = [Table(folder / name) for name in sources_of(run)]
    rows = mix([len(table) for table in tables], [source.weight for source in sources], run.hyperparameters.seed)
    train = tables[0] if rows is None and len(tables) == 1 else Picked(tables, rows)
    held_out = {part: Table(folder / part) if (folder / part).is_dir() else [] for part in (VALIDATION, TEST)}
    stats = DataStats(**index["stats"])
    stats.train_records = len(train)
    stats.train_tokens, stats.loss_tokens = int(train.tokens.sum()), int(train.loss_tokens.sum())
    stats.longest_tokens = int(train.lengths.max())
    views = {
        part: trained_view(run, tokenizer, items, training=part == TRAIN)
        for part, items in {TRAIN: train, **held_out}.items()
    }
    return Encoded(
        train=views[TRAIN],
        validation=views[VALIDATION],
        held_out_prompts=[HeldOutPrompt.from_json(item) for item in index["prompts"]],
        stats=stats,
        sample=index["sample"],
        labels=tuple(index["labels"]),
        test=views[TEST],
    )

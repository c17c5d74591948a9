"""Reads, checks and encodes all the data of a run, record by record, into tables on disk.

Where records are held out or have labels, they are read twice: first to see them all (8 bytes of each are kept), then
to encode them. One text after another is in memory, never the data set.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from finetune_api.digest import canonical_json
from finetune_api.failures import FinetuneError
from finetune_api.job import DataFormat, ObjectiveType, Task
from finetune_api.runfile import RunFile
from finetune_trainer.data.cache import Beat
from finetune_trainer.data.chat import ChatFormat
from finetune_trainer.data.encode import Encoder, Encoding
from finetune_trainer.data.encoders import EncodingRules, RecordEncoder, make_encoder, method
from finetune_trainer.data.formats import Example
from finetune_trainer.data.labels import base_labels, label_names
from finetune_trainer.data.noise import joins_documents
from finetune_trainer.data.prepared import DataStats, HeldOutPrompt, held_out_prompt
from finetune_trainer.data.reader import ExampleReader
from finetune_trainer.data.readers import read_folder
from finetune_trainer.data.records import BadRecord, BadRows
from finetune_trainer.data.split import TEST, TRAIN, VALIDATION, HeldOut, choose_held_out, rank_of
from finetune_trainer.data.table import TableWriter
from finetune_trainer.data.tokenizer import TextTokenizer
from finetune_trainer.data.windows import cut_at, part_border

INDEX = "index.json"
MAX_SHARE_WITHOUT_LOSS = 0.05
"""Largest share of records that may have nothing left to learn after the cut; they are left out and counted."""
_FORM = 1
"""Of what is written: a cache of another form is not read."""
_BATCH_RECORDS = 256
_BATCH_CHARACTERS = 1 << 16
_ENDLESS = 1 << 40

T = TypeVar("T")
Found = tuple[str, int, Example | BadRecord]
"""Part, number of the source, and what was read."""


def sources_of(run: RunFile) -> list[str]:
    """The names of the tables that the sources of a run are encoded to."""
    return [f"{TRAIN}-{number}" for number in range(len(run.dataset.sources))]


def cache_key(run: RunFile, inputs: Path, tokenizer: TextTokenizer) -> str:
    """A name for everything that the encoded data depends on: files, settings and tokenizer."""
    files = []
    for folder in ("data", VALIDATION, TEST):
        for path in sorted(path for path in (inputs / folder).rglob("*") if path.is_file()):
            state = path.stat()
            files.append([path.relative_to(inputs).as_posix(), state.st_size, state.st_mtime_ns])
    hp = run.hyperparameters
    names = base_labels(inputs / "adapter", inputs / "model")
    content: list[Any] = [
        _FORM,
        files,
        run.dataset.to_json(),
        run.objective.to_json(),
        [run.model.task.value, hp.seed, hp.max_sequence_length, hp.packing, run.evaluation.max_generated, list(names)],
        hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest(),
        [tokenizer.chat_template, sorted(tokenizer.variables.items()), list(tokenizer.prefix), list(tokenizer.suffix)],
    ]
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()[:32]


def empty(source: str) -> FinetuneError:
    """The error for a source without a record; source is the spec path of its URI."""
    return FinetuneError(
        f"{source} holds no record. Add records, or remove the source.",
        failure_class="DataInvalid",
        field=f"spec.{source}",
    )


class Preparation:
    """One run's way from files to tables below a folder."""

    def __init__(self, run: RunFile, inputs: Path, tokenizer: TextTokenizer, folder: Path, beat: Beat) -> None:
        """folder exists and is empty."""
        self._run = run
        self._inputs = inputs
        self._tokenizer = tokenizer
        self._folder = folder
        self._beat = beat
        dataset = run.dataset
        self._reader = ExampleReader(
            dataset.format,
            dataset.columns,
            dataset.prompt_template,
            objective=ObjectiveType.PRETRAIN if run.joins_text else run.objective.type,
            task=run.model.task,
            whole_texts=not joins_documents(run),
        )
        self._stats = DataStats()
        self._prompts: dict[str, list[HeldOutPrompt]] = {TRAIN: [], VALIDATION: [], TEST: []}
        self._sample = ""
        self._seen: dict[str, int] = {}

    def make(self) -> None:
        """Writes all tables and the index. Raises FinetuneError as `load_dataset` says."""
        held_out, labels = self._survey()
        with _all_cores():
            encoder = self._encoder(labels)
            self._encode(encoder, held_out)
        self._describe()
        prompts = self._prompts[TEST] or self._prompts[VALIDATION] or self._prompts[TRAIN]
        index = {
            "stats": asdict(self._stats),
            "prompts": [prompt.to_json() for prompt in prompts],
            "sample": self._sample,
            "labels": labels,
        }
        (self._folder / INDEX).write_text(json.dumps(index))

    # ---- reading

    def _places(self) -> list[tuple[str, int, Path, str]]:
        """(part, number of the source, folder, spec path of its URI) of everything to read."""
        dataset = self._run.dataset
        places = [
            (TRAIN, number, self._inputs / "data" / str(number), f"dataset.sources[{number}].uri")
            for number in range(len(dataset.sources))
        ]
        for part, reference in ((VALIDATION, dataset.validation), (TEST, dataset.test)):
            if reference is not None:
                places.append((part, 0, self._inputs / part, f"dataset.{part}.source.uri"))
        return places

    def _found(self) -> Iterator[Found]:
        """Everything that is read, in order. Raises FinetuneError for a source without a record."""
        for part, number, folder, source in self._places():
            some = False
            for item in self._reader.read(read_folder(folder, source)):
                some = True
                yield part, number, item
            if not some:
                raise empty(source)

    def _survey(self) -> tuple[HeldOut, tuple[str, ...]]:
        """Which records are held out, and the names of the labels: whatever needs a look at all records."""
        dataset, run = self._run.dataset, self._run
        splits = dataset.validation_fraction is not None or dataset.test_fraction is not None
        task = run.model.task
        labelled = method(run) is not ObjectiveType.REWARD and task in (
            Task.SEQUENCE_CLASSIFICATION,
            Task.TOKEN_CLASSIFICATION,
        )
        if self._reads_as_one_text() or not (splits or labelled):
            return HeldOut(), ()
        ranks, bad = array("Q"), BadRows()
        counts = {"usable": 0}

        def examples() -> Iterator[Example]:
            for part, _, item in self._found():
                self._beat()
                if isinstance(item, BadRecord):
                    bad.add(item)
                    continue
                counts["usable"] += not item.record.continues
                if item.record.continues:
                    continue  # it is where its text begins
                if splits and part == TRAIN:
                    ranks.append(rank_of(item, run.hyperparameters.seed))
                yield item

        everything = examples()
        first = next(everything, None)
        names: tuple[str, ...] = ()
        if first is not None and labelled:
            base = base_labels(self._inputs / "adapter", self._inputs / "model")
            names = label_names(task, chain([first], everything), base)
        for _ in everything:
            pass
        bad.check(counts["usable"], dataset.max_bad_share)
        held_out = choose_held_out(ranks, dataset.validation_fraction, dataset.test_fraction) if splits else HeldOut()
        return held_out, names

    def _reads_as_one_text(self) -> bool:
        """Whether held-out text is the end of the running text: it is one document, or its windows would overlap."""
        settings = self._run.objective.pretrain
        return self._run.joins_text or (settings is not None and settings.random_windows)

    def _parts(self, held_out: HeldOut) -> Iterator[Found]:
        """Everything that is read, with the part that each example belongs to."""
        if self._reads_as_one_text():
            yield from self._running_text()
            return
        splits = held_out != HeldOut()
        of_text = TRAIN
        for part, number, item in self._found():
            if splits and part == TRAIN and isinstance(item, Example):
                if not item.record.continues:
                    of_text = held_out.part(rank_of(item, self._run.hyperparameters.seed))
                part = of_text
            yield part, number, item

    def _running_text(self) -> Iterator[Found]:
        """The sources as one text, whose end is held out."""
        borders, names = self._borders()
        begin = 0
        for part, number, item in self._found():
            if part != TRAIN or isinstance(item, BadRecord):
                yield part, number, item
                continue
            for place, piece in cut_at(item, begin, borders):
                yield names[place], number if place == 0 else 0, piece
            begin += item.characters

    def _borders(self) -> tuple[list[int], list[str]]:
        """(where the held-out parts of the running text begin, the names of all its parts)."""
        dataset = self._run.dataset
        shares = ((TEST, dataset.test_fraction), (VALIDATION, dataset.validation_fraction))
        wanted = [(name, fraction) for name, fraction in shares if fraction is not None]
        borders: list[int] = []
        end = self._characters() if wanted else 0
        for _, fraction in wanted:
            end = part_border(end, fraction)
            borders.insert(0, end)
        return borders, [TRAIN, *(name for name, _ in reversed(wanted))]

    def _characters(self) -> int:
        """Of the running text, which is read once to count them."""
        total = 0
        for part, _, item in self._found():
            self._beat()
            if part == TRAIN and isinstance(item, Example):
                total += item.characters
        return total

    # ---- encoding

    def _encoder(self, labels: tuple[str, ...]) -> RecordEncoder:
        run, dataset = self._run, self._run.dataset
        reinforcement = run.objective.reinforcement
        rules = EncodingRules(
            loss_on=dataset.loss_on,
            truncation=dataset.truncation,
            max_length=_ENDLESS if joins_documents(run) else run.hyperparameters.max_sequence_length,
            max_source=dataset.max_source_tokens,
            max_target=dataset.max_target_tokens,
            labels=labels,
            new_tokens=reinforcement.max_new_tokens if reinforcement else 0,
        )
        return make_encoder(method(run), run.model.task, self._tokenizer, rules)

    def _encode(self, encoder: RecordEncoder, held_out: HeldOut) -> None:
        """Encodes everything into its tables, and checks what became of it."""
        writers = {name: TableWriter(self._folder / name) for name in sources_of(self._run)}
        bad = {part: BadRows() for part in (TRAIN, VALIDATION, TEST)}
        empty_ones = dict.fromkeys(bad, 0)
        for batch in in_batches(self._parts(held_out), lambda found: found[2]):
            self._beat()
            results = iter(_encode_all(encoder, [item for _, _, item in batch if isinstance(item, Example)]))
            for part, number, item in batch:
                encoding = item if isinstance(item, BadRecord) else next(results)
                continues = isinstance(item, Example) and item.record.continues
                self._seen[part] = self._seen.get(part, 0) + (not continues)
                if isinstance(encoding, BadRecord):
                    bad[part].add(encoding)
                elif encoding is None:
                    empty_ones[part] += 1
                else:
                    assert isinstance(item, Example)  # a BadRecord has no encoding
                    name = f"{TRAIN}-{number}" if part == TRAIN else part
                    if name not in writers:
                        writers[name] = TableWriter(self._folder / name)
                    self._keep(encoder, writers[name], part, item, encoding)
        for writer in writers.values():
            writer.close()
        self._check({name: writer.rows for name, writer in writers.items()}, bad, empty_ones)

    def _keep(
        self, encoder: RecordEncoder, writer: TableWriter, part: str, example: Example, encoding: Encoding
    ) -> None:
        stats = self._stats
        if part == TRAIN and not self._sample:
            self._sample = encoder.show(encoding.example)
        continues = example.record.continues and writer.rows > 0
        writer.add(encoding.example, encoding.kept, continues=continues)
        stats.cut += encoding.cut
        stats.cut_tokens += encoding.length - encoding.kept
        prompts = self._prompts[part]
        asks = part != TRAIN or self._run.objective.type is ObjectiveType.EVALUATION
        if asks and not continues and len(prompts) < self._run.evaluation.max_generated:
            prompt = held_out_prompt(encoder, example, encoding)
            if prompt is not None:
                prompts.append(prompt)

    def _check(self, rows: dict[str, int], bad: dict[str, BadRows], left_out: dict[str, int]) -> None:
        """Raises FinetuneError(DataInvalid) for data that has too little to learn from."""
        stats, dataset = self._stats, self._run.dataset
        stats.records_by_source = {
            source.uri: rows[name] for source, name in zip(dataset.sources, sources_of(self._run), strict=True)
        }
        stats.validation_records, stats.test_records = rows.get(VALIDATION, 0), rows.get(TEST, 0)
        for part, seen in self._seen.items():
            bad[part].check(seen - bad[part].total, dataset.max_bad_share)
            kept = seen - bad[part].total - left_out[part]
            if not kept or left_out[part] > MAX_SHARE_WITHOUT_LOSS * seen:
                raise _nothing_left(left_out[part], seen, part)
            stats.left_out += left_out[part]
            stats.bad_records += bad[part].total
            stats.bad_rows += bad[part].lines()
        kept = sum(rows.values())
        if stats.cut > dataset.max_cut_share * kept:
            raise FinetuneError(
                f"{stats.cut} of {kept} records are longer than they may be and lost {stats.cut_tokens} tokens; "
                f"dataset.maxCutShare allows {dataset.max_cut_share:.3g} of them. Raise "
                "hyperparameters.maxSequenceLength or dataset.maxCutShare, or shorten the records.",
                failure_class="DataInvalid",
                field="spec.dataset.maxCutShare",
            )

    def _describe(self) -> None:
        stats, shape = self._stats, self._reader.shape
        assert shape is not None  # there are records
        stats.format, stats.format_reason = shape.format.value, shape.reason
        if self._run.dataset.prompt_template is not None:
            stats.prompt_form = "dataset.promptTemplate"
        elif shape.format in (DataFormat.TEXT, DataFormat.LABELS, DataFormat.TAGS):
            stats.prompt_form = "plain text"
        elif self._run.model.task is Task.SEQ2SEQ:
            stats.prompt_form = "source and target"
        else:
            stats.prompt_form = ChatFormat(self._tokenizer).name


def _encode_all(encoder: RecordEncoder, examples: list[Example]) -> list[Encoding | BadRecord | None]:
    if isinstance(encoder, Encoder):
        return encoder.encode_many(examples)
    return [encoder.encode(example) for example in examples]


def in_batches(items: Iterable[T], read: Callable[[T], Example | BadRecord]) -> Iterator[list[T]]:
    """What is tokenised at once: some records, or few long ones, because the tokenizer keeps 100 bytes of each token.

    read: what was read as an item.
    """
    batch: list[T] = []
    characters = 0
    for item in items:
        batch.append(item)
        found = read(item)
        characters += found.characters if isinstance(found, Example) else 0
        if len(batch) == _BATCH_RECORDS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _nothing_left(left_out: int, seen: int, part: str) -> FinetuneError:
    what = "training" if part == TRAIN else part
    return FinetuneError(
        f"{left_out} of {seen} {what} records have nothing left to learn once they are cut to "
        "hyperparameters.maxSequenceLength, because the prompt alone fills it. Raise maxSequenceLength or shorten "
        "the prompts.",
        failure_class="DataInvalid",
        field="spec.hyperparameters.maxSequenceLength",
    )


@contextmanager
def _all_cores() -> Iterator[None]:
    """The tokenizer may use threads while the other processes of the node wait."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before

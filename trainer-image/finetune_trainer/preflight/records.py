"""The check of all data: each record of each source is read, understood and measured, one file at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from tempfile import TemporaryDirectory

from finetune_api.failures import FinetuneError
from finetune_api.job import Benchmark, LossOn, ObjectiveType, PretrainTokenizer, Task, Truncation
from finetune_api.metrics import ANSWERED
from finetune_api.planner.settings import LONGEST_DEFAULT_SEQUENCE, SMALLEST_SPLIT_ROWS
from finetune_api.runfile import InputKind, PreflightFile, Reference
from finetune_api.status import DataFacts
from finetune_trainer.data.cutting import too_long
from finetune_trainer.data.encode import question_and_answer
from finetune_trainer.data.formats import Example
from finetune_trainer.data.prepare import MAX_SHARE_WITHOUT_LOSS, empty
from finetune_trainer.data.reader import ExampleReader
from finetune_trainer.data.readers import Row, read_file
from finetune_trainer.data.records import BadRecord, BadRows
from finetune_trainer.data.split import rank_of
from finetune_trainer.data.tokenizer import TextTokenizer
from finetune_trainer.preflight.benchmarks import check_benchmark
from finetune_trainer.preflight.document import finding, remark
from finetune_trainer.preflight.labels import LabelsSeen, labelled
from finetune_trainer.preflight.measure import Limits, Measure, Size
from finetune_trainer.preflight.outcome import Outcome
from finetune_trainer.sources.architectures import model_shape
from finetune_trainer.sources.inspect import read_json, read_tokenizer
from finetune_trainer.sources.place import Place, Purpose, Reach, SourceFile, data_digest
from finetune_trainer.sources.places import FolderPlace, open_source
from finetune_trainer.sources.select import CONFIG, data_files

EXACT_BYTES = 64 << 20
"""Up to this size of the data its tokens are counted, above it they are estimated."""
BYTES_PER_TOKEN = 3.6
_MAX_REASON = 300
_MOST_PARTS = 3  # training, validation and test
_LENGTH = "hyperparameters.maxSequenceLength"


class Role(Enum):
    """What the records of a source are for."""

    TRAINING = auto()
    HELD_OUT = auto()
    RETENTION = auto()
    BENCHMARK = auto()


@dataclass(frozen=True)
class Source:
    """One source of records. field: the spec path of its URI, without `spec.`."""

    reference: Reference
    field: str
    role: Role
    place: Place
    files: tuple[SourceFile, ...]
    benchmark: Benchmark | None = None

    @property
    def bytes(self) -> int:
        """Size of its files."""
        return sum(item.size for item in self.files)


@dataclass
class _Tally:
    """What was seen of the records of one source. left_out: of which the cut leaves nothing to learn."""

    bad: BadRows = field(default_factory=BadRows)
    sizes: list[tuple[int, int]] = field(default_factory=list)  # (tokens, of the longest sequence)
    cut: int = 0
    left_out: int = 0

    def add(self, example: Example, tokens: int, longest: int) -> None:
        """One more record, or more of the one before."""
        if example.record.continues and self.sizes:
            before = self.sizes.pop()
            tokens, longest = before[0] + tokens, before[1] + longest
        self.sizes.append((tokens, longest))


def check_data(file: PreflightFile, reach: Reach, outcome: Outcome) -> None:
    """Reads and checks every record of every source, and counts tokens. Adds a finding for each faulty source."""
    sources = _open_sources(file, reach, outcome)
    check = _DataCheck(file, reach, exact=sum(source.bytes for source in sources) <= EXACT_BYTES)
    tallies = [(source, check.read(source, outcome)) for source in sources]
    trained = [(source, tally) for source, tally in tallies if source.role is Role.TRAINING]
    shape = check.reader.shape
    if shape is None:
        return
    sizes = sorted(size for _, tally in trained for size in tally.sizes)
    longest = sorted(length for _, length in sizes)
    outcome.labels = check.labels
    outcome.data = DataFacts(
        rows=len(sizes),
        bad_rows=sum(tally.bad.total for _, tally in trained),
        format=shape.format.value,
        format_reason=shape.reason[:_MAX_REASON],
        tokens=sum(tokens for tokens, _ in sizes),
        longest_tokens=longest[-1] if longest else 0,
        p95_tokens=longest[(len(longest) * 95 + 99) // 100 - 1] if longest else 0,
        bytes=sum(source.bytes for source, _ in trained),
        digest=data_digest((source.reference.uri, source.files) for source in sources),
    )
    held_out = [tally for source, tally in tallies if source.role is Role.HELD_OUT]
    check.conclude([tally for _, tally in trained], held_out, outcome)


class _DataCheck:
    """Reads the sources of one job in turn. The first training record decides how all records are read."""

    def __init__(self, file: PreflightFile, reach: Reach, *, exact: bool) -> None:
        self._file = file
        self._reach = reach
        self.reader = _reader(file)
        self.labels = LabelsSeen(file.task is Task.TOKEN_CLASSIFICATION) if labelled(file) else None
        self._measure, self._limit = _measure(file, reach) if exact else (None, None)
        self._different: set[int] = set()  # as many as a split can need

    def read(self, source: Source, outcome: Outcome) -> _Tally:
        """Every record of a source; its faults become findings."""
        tally = _Tally()
        try:
            if source.benchmark is not None:
                self._read_benchmark(source, source.benchmark, tally)
            else:
                reader = _general_reader(self._file) if source.role is Role.RETENTION else self.reader
                self._read(source, reader, tally)
            share = self._file.max_bad_share if source.role in (Role.TRAINING, Role.HELD_OUT) else 0.0
            tally.bad.check(len(tally.sizes), share)
            if not tally.sizes:
                raise empty(source.field)
        except FinetuneError as error:
            outcome.findings.append(finding(_at(error, source)))
        return tally

    def _read_benchmark(self, source: Source, name: Benchmark, tally: _Tally) -> None:
        for row in _rows(source, self._reach):
            bad = row if isinstance(row, BadRecord) else check_benchmark(row, name)
            if bad is not None:
                tally.bad.add(bad)
            else:
                tally.sizes.append((0, 0))

    def _read(self, source: Source, reader: ExampleReader, tally: _Tally) -> None:
        examples = self._examples(source, reader, tally.bad)
        if self._measure is None or source.role is Role.RETENTION:
            for example in examples:
                estimate = _estimate(example, self._file)
                tally.add(example, estimate, estimate)
            return
        for item in self._measure.sizes(examples):
            if isinstance(item, BadRecord):
                tally.bad.add(item)
            else:
                self._note_size(*item, tally)

    def _note_size(self, example: Example, size: Size, tally: _Tally) -> None:
        limit = size.longest if self._limit is None else max(self._limit - self._file.new_tokens, 1)
        over = size.longest > limit
        if over and self._file.truncation is Truncation.ERROR:
            tally.bad.add(too_long(example.record, size.longest, limit, field=_LENGTH))
            return
        tally.cut += over or size.cut
        if over and self._is_causal() and not self._teaches(example, limit):
            tally.left_out += 1
        tally.add(example, size.tokens, size.longest)

    def _is_causal(self) -> bool:
        return self._file.task is Task.CAUSAL_LM and self._file.objective in ANSWERED

    def _teaches(self, example: Example, limit: int) -> bool:
        # What dropping the oldest turns leaves is known only once the worker does it.
        assert self._measure is not None
        return self._file.truncation is Truncation.OLDEST_TURNS or self._measure.teaches_within(example, limit)

    def _examples(self, source: Source, reader: ExampleReader, bad: BadRows) -> Iterator[Example]:
        """The usable examples of a source, noted; the others go to bad."""
        for item in reader.read(_rows(source, self._reach)):
            if isinstance(item, BadRecord):
                bad.add(item)
                continue
            if source.role is not Role.RETENTION:
                self._note(item, trains=source.role is Role.TRAINING)
            yield item

    def _note(self, example: Example, *, trains: bool) -> None:
        if self.labels is not None:
            self.labels.add(example, trains=trains)
        if trains and not example.record.continues and len(self._different) < _MOST_PARTS:
            self._different.add(rank_of(example, 0))

    def conclude(self, tallies: list[_Tally], held_out: list[_Tally], outcome: Outcome) -> None:
        """Findings about the training records together, and about how many of them and of held_out are cut."""
        rows, left_out = sum(len(tally.sizes) for tally in tallies), sum(tally.left_out for tally in tallies)
        bad, cut = sum(tally.bad.total for tally in tallies), sum(tally.cut for tally in [*tallies, *held_out])
        whole = rows + sum(len(tally.sizes) for tally in held_out)
        for error in (self._nothing_left(rows, left_out), self._too_much_cut(whole, cut), self._no_split(rows)):
            if error is not None:
                outcome.findings.append(finding(error))
        self._remark(bad, cut, outcome)

    def _too_much_cut(self, rows: int, cut: int) -> FinetuneError | None:
        if cut <= self._file.max_cut_share * rows:
            return None
        return FinetuneError(
            f"{cut} of {rows} records are longer than they may be; dataset.maxCutShare allows "
            f"{self._file.max_cut_share:.3g} of them. Raise {' or '.join(self._limits())} or dataset.maxCutShare, or "
            "shorten the records.",
            failure_class="DataInvalid",
            field="spec.dataset.maxCutShare",
        )

    def _limits(self) -> list[str]:
        """Everything that cuts a record, with its value."""
        given = (
            (_LENGTH, self._limit),
            ("dataset.maxSourceTokens", self._file.max_source_tokens),
            ("dataset.maxTargetTokens", self._file.max_target_tokens),
        )
        return [f"{name} {tokens}" for name, tokens in given if tokens is not None]

    def _nothing_left(self, rows: int, left_out: int) -> FinetuneError | None:
        if left_out <= MAX_SHARE_WITHOUT_LOSS * rows:
            return None
        return FinetuneError(
            f"{left_out} of {rows} records have nothing left to learn once they are cut to {_LENGTH} {self._limit}, "
            f"because the prompt alone fills it. Raise {_LENGTH} or shorten the prompts.",
            failure_class="DataInvalid",
            field=f"spec.{_LENGTH}",
        )

    def _no_split(self, rows: int) -> FinetuneError | None:
        file = self._file
        fresh = file.objective is ObjectiveType.PRETRAIN
        one_text = file.random_windows or file.joins_text  # its end is held out
        if file.objective is ObjectiveType.EVALUATION or one_text or rows == 0:
            return None
        asked = file.validation_fraction is not None
        planned = file.validation is None and (asked or fresh or rows >= SMALLEST_SPLIT_ROWS)
        parts = 1 + planned + (file.test_fraction is not None)
        found = len(self._different)
        if found >= parts:
            return None
        # Without the field a tenth would be held out all the same, of all but small data sets.
        removable = not fresh and rows < SMALLEST_SPLIT_ROWS and (asked or file.test_fraction is not None)
        field = "dataset.validation" if asked else "dataset.test" if file.test_fraction else "dataset.sources[0].uri"
        return FinetuneError(
            f"Holding records out needs at least {parts} different ones, and the {rows} training records hold {found}. "
            f"Add records{f', or remove {field}' if removable else ''}"
            f"{', or set objective.pretrain.randomWindows: true to hold out the end of the text' if fresh else ''}.",
            failure_class="DataInvalid",
            field=f"spec.{field}",
        )

    def _remark(self, bad: int, cut: int, outcome: Outcome) -> None:
        if self._measure is None and self._file.pretrain_tokenizer is not PretrainTokenizer.CHARACTER:
            outcome.findings.append(remark(f"Tokens are estimated from bytes ({BYTES_PER_TOKEN} bytes each)."))
        if bad and self._file.max_bad_share:
            outcome.findings.append(
                remark(f"{bad} records cannot be used and are left out.", "spec.dataset.maxBadShare")
            )
        if cut:
            outcome.findings.append(remark(f"{cut} records are longer than {' or '.join(self._limits())} and are cut."))
        if self._measure is not None and self._measure.plain_chat:
            outcome.findings.append(
                remark(
                    "The model has no chat template, so records are written as 'User: … Assistant: …'. Set "
                    "dataset.promptTemplate for another form.",
                    "spec.dataset.promptTemplate",
                )
            )


def _reader(file: PreflightFile) -> ExampleReader:
    objective = ObjectiveType.PRETRAIN if file.joins_text else file.objective
    return ExampleReader(file.format, file.columns, file.prompt_template, objective=objective, task=file.task)


def _general_reader(file: PreflightFile) -> ExampleReader:
    """Retention data has a shape of its own."""
    task = file.task if file.task in (Task.SEQ2SEQ, Task.MASKED_LM) else Task.CAUSAL_LM
    return ExampleReader(None, None, None, objective=ObjectiveType.SUPERVISED, task=task)


def _at(error: FinetuneError, source: Source) -> FinetuneError:
    """The error, told of the source whose record it is about where that is not the data set as a whole."""
    if source.role is Role.RETENTION and error.field is not None and error.field.startswith("spec.dataset."):
        error.field = f"spec.{source.field}"
    return error


def _measure(file: PreflightFile, reach: Reach) -> tuple[Measure | None, int | None]:
    """(what counts tokens, the longest sequence), as far as the model can be read; the check of the model tells why not.

    No limit: text that is cut into blocks.
    """
    if file.pretrain_tokenizer not in (None, PretrainTokenizer.MODEL):
        return None, None
    try:
        place = open_source(file.model, purpose=Purpose.CONFIG, field="model.uri", reach=reach)
        tokenizer = TextTokenizer.from_files(read_tokenizer(place))
        positions = model_shape(read_json(place, CONFIG, field="model.uri")).max_positions
    except FinetuneError:
        return None, None
    limits = Limits(file.max_source_tokens, file.max_target_tokens, file.truncation is Truncation.ERROR)
    measure = Measure(tokenizer, file.objective, file.task, file.loss_on or LossOn.COMPLETION, limits)
    default = min(LONGEST_DEFAULT_SEQUENCE, positions or LONGEST_DEFAULT_SEQUENCE)
    cut = file.objective is ObjectiveType.PRETRAIN or file.joins_text
    return measure, None if cut else file.max_sequence_length or default


def _open_sources(file: PreflightFile, reach: Reach, outcome: Outcome) -> list[Source]:
    """In the order of the run file's inputs, which is that of the digest."""
    wanted: list[tuple[Reference, str, Role, Benchmark | None]] = []
    for number, reference in enumerate(file.sources):
        wanted.append((reference, f"dataset.sources[{number}].uri", Role.TRAINING, None))
    if file.validation is not None:
        wanted.append((file.validation, "dataset.validation.source.uri", Role.HELD_OUT, None))
    for item in file.further:
        if item.kind is InputKind.DATA:
            role = Role.HELD_OUT if item.field.startswith("dataset.") else Role.RETENTION
            role = role if item.benchmark is None else Role.BENCHMARK
            wanted.append((item.reference, item.field, role, item.benchmark))
    sources = []
    for reference, spec_field, role, benchmark in wanted:
        try:
            place = open_source(reference, purpose=Purpose.DATA, field=spec_field, reach=reach)
            files = data_files(place, reference, field=spec_field)
            sources.append(Source(reference, spec_field, role, place, files, benchmark))
        except FinetuneError as error:
            outcome.findings.append(finding(error))
            if error.failure_class == "StorageUnavailable":
                break  # the next source would wait just as long
    return sources


def _rows(source: Source, reach: Reach) -> Iterator[Row]:
    # One file at a time, so that the scratch disk has to hold the largest file only.
    for item in source.files:
        with TemporaryDirectory(prefix="preflight-") as folder:
            path = Path(folder, "records" + Path(item.name).suffix)
            if isinstance(source.place, FolderPlace):
                source.place.bring(item.name, path)
            else:
                with path.open("wb") as target:
                    for chunk in source.place.stream(item.name):
                        target.write(chunk)
            for row in read_file(path, source.field, item.name):
                reach.beat()
                yield row


def _estimate(example: Example, file: PreflightFile) -> int:
    """Tokens without a tokenizer: characters and the end where a character is a token, else from the bytes.

    A question and its answer count up to their limits.
    """
    texts = [turn.text for turn in (*example.turns, *example.chosen, *example.rejected)]
    texts += example.words
    if file.pretrain_tokenizer is PretrainTokenizer.CHARACTER:
        return sum(map(len, texts)) + 1
    tokens = [len(text.encode()) / BYTES_PER_TOKEN for text in texts]
    limits = (file.max_source_tokens, file.max_target_tokens)
    for at, limit in zip(question_and_answer(example.turns), limits, strict=True):
        if limit is not None and 0 <= at < len(example.turns):
            tokens[at] = min(tokens[at], limit)
    return max(round(sum(tokens)), 1)

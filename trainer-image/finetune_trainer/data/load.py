"""From the files of a run to encoded examples: `load_dataset` is the main flow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api.failures import FinetuneError
from finetune_api.job import Columns, DataFormat
from finetune_api.runfile import RunFile
from finetune_trainer.data.encode import IGNORED, Encoder, Encoding, as_array
from finetune_trainer.data.formats import Example, RecordShape, resolve_shape, to_example
from finetune_trainer.data.readers import Row, read_folder
from finetune_trainer.data.records import BadRecord, BadRows
from finetune_trainer.data.split import choose_held_out, mix
from finetune_trainer.data.tokenizer import TextTokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast

HELD_OUT_PROMPTS = 32
MAX_SHARE_WITHOUT_LOSS = 0.05
"""Largest share of records that may have nothing left to learn after the cut; they are left out and counted."""


@dataclass(frozen=True, slots=True)
class HeldOutPrompt:
    """A prompt for the model to answer, with the answer that the data gives.

    prompt: what a person asked, without the template's marks; prompt_ids: all that the model sees. origin: where the
    record is.
    """

    prompt: str
    prompt_ids: NDArray[np.int32]
    reference: str
    origin: str


@dataclass
class DataStats:
    """What became of the data. Tokens are those that are trained on, after the cut.

    cut: records that were shortened; cut_tokens: tokens that this cost; left_out: records of which nothing to learn
    was left.
    """

    format: str = ""
    format_reason: str = ""
    prompt_form: str = ""
    train_records: int = 0
    validation_records: int = 0
    train_tokens: int = 0
    loss_tokens: int = 0
    longest_tokens: int = 0
    cut: int = 0
    cut_tokens: int = 0
    left_out: int = 0
    records_by_source: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For the report: camelCase names."""

        def camel(name: str) -> str:
            head, *rest = name.split("_")
            return head + "".join(word.capitalize() for word in rest)

        return {camel(name): value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Encoded:
    """The data of a run. sample: the first record as text with the loss between ⟦ and ⟧, to be printed at start.

    labels: the names of classes or tags, in the order of their numbers. test: held out for the end only.
    """

    train: Sequence[Any]
    validation: Sequence[Any]
    held_out_prompts: list[HeldOutPrompt]
    stats: DataStats
    sample: str
    labels: tuple[str, ...] = ()
    test: Sequence[Any] = ()


class ExampleReader:
    """Turns the records of all sources of a data set into examples. The first record decides the shape of all."""

    def __init__(self, format: DataFormat | None, columns: Columns | None, prompt_template: str | None) -> None:
        self._settings = (format, columns, prompt_template)
        self._shape: RecordShape | None = None

    @property
    def shape(self) -> RecordShape | None:
        """How records are read; None before the first one."""
        return self._shape

    def read(self, rows: Iterable[Row]) -> Iterator[Example | BadRecord]:
        """The examples of rows. Raises FinetuneError if no format fits the first record, or a setting does not."""
        for row in rows:
            if isinstance(row, BadRecord):
                yield row
                continue
            if self._shape is None:
                self._shape = resolve_shape(*self._settings, row.fields)
            yield to_example(row, self._shape)


def load_dataset(run: RunFile, inputs: Path, tokenizer: PreTrainedTokenizerFast) -> Encoded:
    """The encoded data of a run: the same on every process and in every attempt.

    inputs: holds `data/<i>` for source i and `validation` for a validation source. Raises FinetuneError: DataInvalid
    for data that is empty or has unusable records, InvalidSpec for settings that do not fit it.
    """
    dataset, seed = run.dataset, run.hyperparameters.seed
    reader = ExampleReader(dataset.format, dataset.columns, dataset.prompt_template)
    folders = [(inputs / "data" / str(k), f"dataset.sources[{k}].uri") for k in range(len(dataset.sources))]
    sources = [_read(reader, *folder) for folder in folders]
    held_out: list[Example] = []
    if dataset.validation is not None:
        held_out = _read(reader, inputs / "validation", "dataset.validation.source.uri")
    elif dataset.validation_fraction is not None:
        sources, held_out = _hold_out(sources, dataset.validation_fraction, seed)
    encoder = Encoder(
        TextTokenizer.from_transformers(tokenizer),
        loss_on=dataset.loss_on,
        truncation=dataset.truncation,
        max_length=run.hyperparameters.max_sequence_length,
    )
    stats = DataStats(
        records_by_source={ref.uri: len(source) for ref, source in zip(dataset.sources, sources, strict=True)}
    )
    train_encodings = _encode(encoder, mix(sources, [ref.weight for ref in dataset.sources], seed), stats, "training")
    validation_encodings = _encode(encoder, held_out, stats, "validation") if held_out else []
    _fill(stats, reader, encoder, dataset.prompt_template, train_encodings, validation_encodings)
    return Encoded(
        train=[encoding.example for _, encoding in train_encodings],
        validation=[encoding.example for _, encoding in validation_encodings],
        held_out_prompts=_prompts(encoder, validation_encodings),
        stats=stats,
        sample=encoder.show(train_encodings[0][1].example),
    )


def _read(reader: ExampleReader, folder: Path, source: str) -> list[Example]:
    bad, examples = BadRows(), []
    for item in reader.read(read_folder(folder, source)):
        if isinstance(item, BadRecord):
            bad.add(item)
        else:
            examples.append(item)
    bad.check(len(examples))
    if not examples:
        raise empty(source)
    return examples


def empty(source: str) -> FinetuneError:
    """The error for a source without a record; source is the spec path of its URI."""
    return FinetuneError(
        f"{source} holds no record. Add records, or remove the source.",
        failure_class="DataInvalid",
        field=f"spec.{source}",
    )


def _hold_out(sources: list[list[Example]], fraction: float, seed: int) -> tuple[list[list[Example]], list[Example]]:
    """(the rest of each source, what is held out of them all)."""
    flags = iter(choose_held_out([example for source in sources for example in source], fraction, seed))
    marked = [[(example, next(flags)) for example in source] for source in sources]
    rest = [[example for example, out in source if not out] for source in marked]
    return rest, [example for source in marked for example, out in source if out]


def _encode(encoder: Encoder, examples: list[Example], stats: DataStats, what: str) -> list[tuple[Example, Encoding]]:
    bad, encoded, left_out = BadRows(), [], 0
    for example in examples:
        encoding = encoder.encode(example)
        if isinstance(encoding, BadRecord):
            bad.add(encoding)
        elif encoding is None:
            left_out += 1
        else:
            encoded.append((example, encoding))
            stats.cut += encoding.cut
            stats.cut_tokens += encoding.length - encoding.kept
    bad.check(len(examples) - bad.total)
    if not encoded or left_out > MAX_SHARE_WITHOUT_LOSS * len(examples):
        raise FinetuneError(
            f"{left_out} of {len(examples)} {what} records have nothing left to learn once they are cut to "
            "hyperparameters.maxSequenceLength, because the prompt alone fills it. Raise maxSequenceLength or shorten "
            "the prompts.",
            failure_class="DataInvalid",
            field="spec.hyperparameters.maxSequenceLength",
        )
    stats.left_out += left_out
    return encoded


def _fill(
    stats: DataStats,
    reader: ExampleReader,
    encoder: Encoder,
    template: str | None,
    train: list[tuple[Example, Encoding]],
    validation: list[tuple[Example, Encoding]],
) -> None:
    shape = reader.shape
    assert shape is not None  # there are records
    stats.format, stats.format_reason = shape.format.value, shape.reason
    if template is not None:
        stats.prompt_form = "dataset.promptTemplate"
    else:
        stats.prompt_form = "plain text" if shape.format is DataFormat.TEXT else encoder.chat.name
    stats.train_records, stats.validation_records = len(train), len(validation)
    for _, encoding in train:
        stats.train_tokens += len(encoding.example.input_ids)
        stats.loss_tokens += int((encoding.example.labels[1:] != IGNORED).sum())
        stats.longest_tokens = max(stats.longest_tokens, len(encoding.example.input_ids))


def _prompts(encoder: Encoder, held_out: list[tuple[Example, Encoding]]) -> list[HeldOutPrompt]:
    prompts: list[HeldOutPrompt] = []
    for example, encoding in held_out:
        if len(prompts) < HELD_OUT_PROMPTS and encoding.prompt < len(encoding.example.input_ids):
            ids, reference = encoder.prompt_of(encoding)
            asked = [turn.text for turn in example.turns if turn.role in ("user", "prompt")]
            text = asked[-1] if asked else encoder.tokenizer.decode(ids)
            prompts.append(HeldOutPrompt(text.strip(), as_array(ids), reference, example.record.where))
    return prompts

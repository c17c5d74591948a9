"""The three checks. Each adds to an Outcome as it goes, so that what it found is kept if it has to be given up."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from finetune_api.failures import FinetuneError
from finetune_api.job import DataFormat, LossOn, OnExisting, Task, Truncation
from finetune_api.runfile import PreflightFile, Reference
from finetune_api.status import DataFacts, Finding, ModelFacts
from finetune_trainer.data.chat import ChatError
from finetune_trainer.data.encode import Encoder, Rendered
from finetune_trainer.data.formats import Example
from finetune_trainer.data.load import ExampleReader, empty
from finetune_trainer.data.readers import Row, read_file
from finetune_trainer.data.records import BadRecord, BadRows
from finetune_trainer.data.tokenizer import TextTokenizer
from finetune_trainer.preflight.document import finding, remark
from finetune_trainer.sources.inspect import inspect_model, read_tokenizer
from finetune_trainer.sources.place import Place, Purpose, Reach, SourceFile, data_digest
from finetune_trainer.sources.places import FolderPlace, open_output, open_source, with_field
from finetune_trainer.sources.select import data_files
from finetune_trainer.store.documents import Claim
from finetune_trainer.store.errors import ConditionalWriteUnsupported, StoreError
from finetune_trainer.store.objects import ObjectStore, join_key

EXACT_BYTES = 64 << 20
"""Up to this size of the data its tokens are counted, above it they are estimated."""
BYTES_PER_TOKEN = 3.6
_BATCH = 512
_MAX_REASON = 300
_CLAIM_NAME = re.compile(r"(?:-([1-9]\d{0,8}))?\.json")


@dataclass
class Outcome:
    """What the checks found so far. claim: who owns the output, if anybody does."""

    findings: list[Finding] = field(default_factory=list)
    model: ModelFacts | None = None
    data: DataFacts | None = None
    claim: Claim | None = None


def check_model(file: PreflightFile, reach: Reach, outcome: Outcome) -> None:
    """Reads config, weight headers and tokenizer files of the model. Raises FinetuneError for the first fault."""
    if file.task is not Task.CAUSAL_LM:
        raise FinetuneError(
            f"model.task is {file.task.value}, which this release cannot tune. Set it to CausalLM or remove it.",
            failure_class="InvalidSpec",
            field="spec.model.task",
        )
    place = open_source(file.model, purpose=Purpose.MODEL, field="model.uri", reach=reach)
    outcome.model = inspect_model(place)
    tokenizer = read_tokenizer(place)
    if tokenizer.tokenizer_json is not None:
        TextTokenizer.from_files(tokenizer)


def check_output(file: PreflightFile, reach: Reach, outcome: Outcome) -> None:
    """Reads who owns the output; writes and deletes a small object there. Raises FinetuneError for the first fault."""
    store, prefix = open_output(file.output, field="output.uri", reach=reach)
    probe = join_key(prefix, f".preflight-{file.job.uid}-{secrets.token_hex(4)}")
    try:
        outcome.claim = _owner(store, prefix)
        try:
            first = store.put_if_absent(probe, b"written by preflight to see whether it can\n")
            if first and store.put_if_absent(probe, b"a second time\n"):
                raise ConditionalWriteUnsupported(
                    f"the storage of {store.uri(prefix)} ignores If-None-Match, without which two jobs could overwrite "
                    "one another. Use a server with conditional writes."
                )
        finally:
            store.delete(probe)
    except StoreError as error:
        raise with_field(error, "output.uri") from None
    reach.beat()


def _owner(store: ObjectStore, prefix: str) -> Claim | None:
    """The claim that counts: the first owner's CLAIM.json, or that of the last job that took the run over."""
    base = join_key(prefix, "CLAIM")
    numbers = []
    for item in store.list(base):
        if match := _CLAIM_NAME.fullmatch(item.key.removeprefix(base)):
            numbers.append(int(match[1] or 0))
    if not numbers:
        return None
    newest = max(numbers)
    return Claim.read(store, f"{base}-{newest}.json" if newest else f"{base}.json")


def check_claim(file: PreflightFile, outcome: Outcome) -> None:
    """Raises FinetuneError(OutputInUse) if the output belongs to a job whose run this one cannot continue."""
    claim = outcome.claim
    if claim is None or claim.job_uid == file.job.uid:
        return
    owner = f"{file.output.uri} belongs to the job {claim.namespace}/{claim.name}"
    if file.on_existing is OnExisting.FAIL:
        raise FinetuneError(
            f"{owner}. Choose another output.uri, or set output.onExisting: Resume to continue the same run.",
            failure_class="OutputInUse",
            field="spec.output.uri",
        )
    pairs = (("model", claim.model_digest, outcome.model), ("data", claim.data_digest, outcome.data))
    differs = [word for word, digest, facts in pairs if facts is not None and facts.digest != digest]
    if differs:
        raise FinetuneError(
            f"{owner} and was made with another {' and another '.join(differs)}, so it cannot be continued. "
            "Choose another output.uri.",
            failure_class="OutputInUse",
            field="spec.output.uri",
        )


@dataclass(frozen=True)
class _Source:
    reference: Reference
    field: str
    place: Place
    files: tuple[SourceFile, ...]


def check_data(file: PreflightFile, reach: Reach, outcome: Outcome) -> None:
    """Reads and checks every record of every source, and counts tokens. Adds a finding for each faulty source."""
    sources = _open_sources(file, reach, outcome)
    size = sum(item.size for source in sources for item in source.files)
    reader = ExampleReader(file.format, file.columns, file.prompt_template)
    encoder = _encoder(file, reach) if size <= EXACT_BYTES else None
    counts: list[int] = []
    bad_rows = 0
    for source in sources:
        bad = BadRows()
        lengths = list(_lengths(_examples(source, reader, bad, reach), encoder, bad))
        if source.field.startswith("dataset.sources"):
            counts += lengths
            bad_rows += bad.total
        try:
            bad.check(len(lengths))
            if not lengths:
                raise empty(source.field)
        except FinetuneError as error:
            outcome.findings.append(finding(error))
    if reader.shape is None:
        return
    counts.sort()
    outcome.data = DataFacts(
        rows=len(counts),
        bad_rows=bad_rows,
        format=reader.shape.format.value,
        format_reason=reader.shape.reason[:_MAX_REASON],
        tokens=sum(counts),
        longest_tokens=counts[-1] if counts else 0,
        p95_tokens=counts[(len(counts) * 95 + 99) // 100 - 1] if counts else 0,
        bytes=sum(item.size for s in sources for item in s.files if s.field.startswith("dataset.sources")),
        digest=data_digest((source.reference.uri, source.files) for source in sources),
    )
    if encoder is None:
        outcome.findings.append(remark(f"Tokens are estimated from bytes ({BYTES_PER_TOKEN} bytes each)."))
    elif (
        encoder.tokenizer.chat_template is None
        and not file.prompt_template
        and (reader.shape.format is not DataFormat.TEXT)
    ):
        outcome.findings.append(
            remark(
                "The model has no chat template, so records are written as 'User: … Assistant: …'. Set "
                "dataset.promptTemplate for another form.",
                "spec.dataset.promptTemplate",
            )
        )


def _open_sources(file: PreflightFile, reach: Reach, outcome: Outcome) -> list[_Source]:
    wanted = [(reference, f"dataset.sources[{k}].uri") for k, reference in enumerate(file.sources)]
    if file.validation is not None:
        wanted.append((file.validation, "dataset.validation.source.uri"))
    sources = []
    for reference, spec_field in wanted:
        try:
            place = open_source(reference, purpose=Purpose.DATA, field=spec_field, reach=reach)
            sources.append(_Source(reference, spec_field, place, data_files(place, reference, field=spec_field)))
        except FinetuneError as error:
            outcome.findings.append(finding(error))
            if error.failure_class == "StorageUnavailable":
                break  # the next source would wait just as long
    return sources


def _encoder(file: PreflightFile, reach: Reach) -> Encoder | None:
    """An encoder with the model's tokenizer; None if it cannot be had, which the check of the model tells."""
    try:
        place = open_source(file.model, purpose=Purpose.MODEL, field="model.uri", reach=reach)
        tokenizer = TextTokenizer.from_files(read_tokenizer(place))
        return Encoder(tokenizer, loss_on=LossOn.COMPLETION, truncation=Truncation.TAIL, max_length=1 << 30)
    except FinetuneError:
        return None


def _examples(source: _Source, reader: ExampleReader, bad: BadRows, reach: Reach) -> Iterator[Example]:
    """The usable examples of a source; the others go to bad."""
    for item in reader.read(_rows(source, reach)):
        if isinstance(item, BadRecord):
            bad.add(item)
        else:
            yield item


def _rows(source: _Source, reach: Reach) -> Iterator[Row]:
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


def _lengths(examples: Iterator[Example], encoder: Encoder | None, bad: BadRows) -> Iterator[int]:
    """The tokens of each example. What the chat template refuses goes to bad."""
    batch: list[Rendered] = []
    for example in examples:
        if encoder is None:
            size = sum(len(turn.text.encode()) for turn in example.turns)
            yield max(round(size / BYTES_PER_TOKEN), 1)
            continue
        try:
            batch.append(encoder.render(example.turns))
        except ChatError as error:
            bad.add(example.record.bad(str(error), "Correct the messages, or set dataset.promptTemplate."))
        if len(batch) == _BATCH:
            yield from encoder.lengths(batch)
            batch = []
    if encoder is not None and batch:
        yield from encoder.lengths(batch)

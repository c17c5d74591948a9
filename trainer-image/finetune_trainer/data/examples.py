"""Records as examples, and what is wrong with those that cannot be used."""

from __future__ import annotations

from finetune_api.job import DataFormat
from finetune_trainer.data.conversation import conversation
from finetune_trainer.data.formats import Example, RecordShape, Turn
from finetune_trainer.data.pairs import judged, pair
from finetune_trainer.data.records import BadRecord, Record
from finetune_trainer.data.values import absent, filled, label_of, text_of, words_of


def to_example(record: Record, shape: RecordShape) -> Example | BadRecord:
    """The example that a record stands for, or what is wrong with the record."""
    if shape.format is DataFormat.PREFERENCE:
        return judged(record, shape) if shape.judged else pair(record, shape)
    if shape.format in (DataFormat.MESSAGES, DataFormat.SHARE_GPT):
        return conversation(record, shape.columns["messages"], prompts=shape.prompts)
    if shape.format is DataFormat.TAGS:
        return _tagged(record, shape)
    if shape.format is DataFormat.LABELS:
        return _labelled(record, shape)
    if shape.template is not None:
        return _filled(record, shape)
    return _asked(record, shape)


def _asked(record: Record, shape: RecordShape) -> Example | BadRecord:
    """Plain text, or a question and its answer from columns of their own."""
    texts: dict[str, str] = {}
    for role, column in shape.columns.items():
        if absent(record, shape, role):
            continue
        found = text_of(record, role, column, allow_empty=role in shape.optional)
        if isinstance(found, BadRecord):
            return found
        texts[role] = found
    if shape.format is DataFormat.TEXT:
        return Example(record, (Turn("text", texts["text"]),))
    prompt = texts["prompt"]
    if texts.get("input", "").strip():
        prompt = f"{prompt}\n\n{texts['input']}"
    turns = [Turn("user", prompt)]
    if texts.get("completion", "").strip():
        turns.append(Turn("assistant", texts["completion"]))
    return Example(record, tuple(turns))


def _filled(record: Record, shape: RecordShape) -> Example | BadRecord:
    """A template's text, split before the completion where it ends with one."""
    found = filled(record, shape, None if shape.format is DataFormat.TEXT else shape.columns.get("completion"))
    if isinstance(found, BadRecord):
        return found
    prompt, completion = found
    if not (prompt + completion).strip():
        return record.bad("the text that dataset.promptTemplate makes of it is empty", "Give it a text.")
    if shape.format is DataFormat.TEXT:
        return Example(record, (Turn("text", prompt),))
    turns = (Turn("prompt", prompt), Turn("completion", completion))
    return Example(record, turns if completion.strip() else turns[:1])


def _labelled(record: Record, shape: RecordShape) -> Example | BadRecord:
    """A text and the name of its class."""
    label = label_of(record, shape.columns["label"])
    if isinstance(label, BadRecord):
        return label
    if shape.template is None:
        text = text_of(record, "text", shape.columns["text"])
    else:
        found = filled(record, shape, None)
        text = found if isinstance(found, BadRecord) else found[0]
    if isinstance(text, BadRecord):
        return text
    return Example(record, (Turn("text", text),), label=label)


def _tagged(record: Record, shape: RecordShape) -> Example | BadRecord:
    """Words and their BIO tags."""
    words = words_of(record, "tokens", shape.columns["tokens"])
    tags = words_of(record, "tags", shape.columns["tags"])
    if isinstance(words, BadRecord):
        return words
    if isinstance(tags, BadRecord):
        return tags
    if len(words) != len(tags):
        return record.bad(f"{len(words)} words, but {len(tags)} tags", "Give each word one tag.")
    before = "O"
    for number, tag in enumerate(tags, 1):
        kind, dash, name = tag.partition("-")
        if tag != "O" and not (kind in ("B", "I") and dash and name):
            return record.bad(
                f"tag {number} is {tag[:40]!r}", "Write tags as O, B-<type> for the first word of an entity, I-<type>."
            )
        if kind == "I" and before not in (f"B-{name}", f"I-{name}"):
            return record.bad(
                f"tag {number} is {tag[:40]!r}, but the tag before it is {before[:40]!r}",
                f"Begin an entity with B-{name[:40]}.",
            )
        before = tag
    return Example(record, (), words=words, tags=tags)

"""Tokenizers that a Pretrain run learns from its own text: byte pairs, or single characters.

The same text always gives the same tokenizer: byte pairs are merged by count, ties by the lower id, and characters
stand in the order of their code points. All records of the sources are read, held-out ones included: a vocabulary
holds no answers, and a character that only the held-out part has would otherwise be unknown.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from finetune_api.failures import FinetuneError
from finetune_api.job import PretrainTokenizer, Task
from finetune_api.runfile import RunFile
from finetune_trainer.agent.workdir import WorkDir
from finetune_trainer.data.noise import SENTINELS, sentinel
from finetune_trainer.data.reader import ExampleReader
from finetune_trainer.data.readers import read_folder
from finetune_trainer.data.records import BadRecord

_ALPHABET = 256


@dataclass(frozen=True)
class Specials:
    """The special tokens of a learnt tokenizer; the first ids, in this order. cls: only with frames."""

    pad: str
    eos: str
    unk: str
    cls: str | None = None
    mask: str | None = None
    sentinels: int = 0

    @property
    def texts(self) -> list[str]:
        """All of them."""
        named = [text for text in (self.pad, self.eos, self.unk, self.cls, self.mask) if text]
        return [*named, *(sentinel(number) for number in range(self.sentinels))]


# As GPT-2, BERT and T5 call theirs.
SPECIALS = {
    Task.CAUSAL_LM: Specials(pad="<|pad|>", eos="<|endoftext|>", unk="<|unk|>"),
    Task.MASKED_LM: Specials(pad="[PAD]", eos="[SEP]", unk="[UNK]", cls="[CLS]", mask="[MASK]"),
    Task.SEQ2SEQ: Specials(pad="<pad>", eos="</s>", unk="<unk>", sentinels=SENTINELS),
}


def learns_tokenizer(run: RunFile) -> bool:
    """Whether the run's tokenizer comes from its own text."""
    return run.objective.pretrain is not None and run.objective.pretrain.tokenizer is not PretrainTokenizer.MODEL


def learnt_tokenizer(run: RunFile, work: WorkDir, folder: Path) -> PreTrainedTokenizerFast:
    """The run's tokenizer, learnt once on each node and saved to folder as the stock library reads it.

    Every rank calls it; the first one learns while the others wait. Raises FinetuneError as learn_tokenizer and the
    reading of data do.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            tokenizer = learn_tokenizer(run, source_texts(run, work.inputs))
            tokenizer.add_tokens(run.model.add_special_tokens or [], special_tokens=True)
            tokenizer.save_pretrained(partial)
            partial.rename(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def learn_tokenizer(run: RunFile, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer for the run's task from texts. Raises InvalidSpec for a vocabulary that has no room for bytes."""
    settings = run.objective.pretrain
    assert settings is not None  # asked by learns_tokenizer
    specials = SPECIALS[run.model.task]
    if settings.tokenizer is PretrainTokenizer.CHARACTER:
        backend = _characters(texts, specials)
    else:
        assert settings.vocabulary_size is not None  # the planner gives BytePair its size
        backend = _byte_pairs(texts, specials, settings.vocabulary_size)
    if specials.cls is not None:
        first, last = (
            (specials.cls, backend.token_to_id(specials.cls)),
            (specials.eos, backend.token_to_id(specials.eos)),
        )
        backend.post_processor = processors.TemplateProcessing(
            single=f"{specials.cls} $A {specials.eos}",
            pair=f"{specials.cls} $A {specials.eos} $B {specials.eos}",
            special_tokens=[first, last],
        )
    extra = [sentinel(number) for number in range(specials.sentinels)]
    options = {"cls_token": specials.cls, "mask_token": specials.mask}
    if specials.cls is not None:
        options["sep_token"] = specials.eos
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=specials.eos,
        pad_token=specials.pad,
        unk_token=specials.unk,
        model_max_length=settings.block_size,
        clean_up_tokenization_spaces=False,
        **{name: text for name, text in options.items() if text is not None},
        **({"additional_special_tokens": extra} if extra else {}),
    )


def _byte_pairs(texts: Iterable[str], specials: Specials, size: int) -> Tokenizer:
    least = _ALPHABET + len(specials.texts)
    if size < least:
        raise FinetuneError(
            f"objective.pretrain.vocabularySize {size} has no room for {_ALPHABET} bytes and "
            f"{len(specials.texts)} special tokens. Give it at least {least}.",
            failure_class="InvalidSpec",
            field="spec.objective.pretrain.vocabularySize",
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=specials.texts,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _characters(texts: Iterable[str], specials: Specials) -> Tokenizer:
    found: set[str] = set()
    for text in texts:
        found.update(text)
    vocabulary = {token: number for number, token in enumerate(chain(specials.texts, sorted(found)))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=specials.unk))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(specials.texts)
    return backend


def source_texts(run: RunFile, inputs: Path) -> Iterator[str]:
    """The texts of all records of the run's sources, in their order; bad records are left to the reading of data."""
    dataset = run.dataset
    reader = ExampleReader(
        dataset.format, dataset.columns, dataset.prompt_template, objective=run.objective.type, task=run.model.task
    )
    for number in range(len(dataset.sources)):
        rows = read_folder(inputs / "data" / str(number), f"dataset.sources[{number}].uri")
        for example in reader.read(rows):
            if not isinstance(example, BadRecord):
                yield from (turn.text for turn in example.turns)

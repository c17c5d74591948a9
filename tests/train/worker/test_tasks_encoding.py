"""Records of the tasks as tokens: what the model's own tokenizer makes of them, with labels where they belong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import FinetuneError
from finetune_api.job import LossOn, Task, Truncation
from finetune_trainer.data.encoders import EncodingRules
from finetune_trainer.data.formats import Example, Turn
from finetune_trainer.data.labels import LabelEncoder, base_labels, label_names
from finetune_trainer.data.records import BadRecord, Record
from finetune_trainer.data.seq2seq import Seq2SeqEncoder
from finetune_trainer.data.tags import TagEncoder
from finetune_trainer.data.tokenizer import TextTokenizer
from tests.train.worker.runs import in_child

TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "Paris is the capital of France",
    "unbelievable tokenisation, isn't it?",
    "the board of directors met in New York",
]
WORDS = [("Barack", "Obama", "visited", "unbelievable", "Paris", "."), ("isn't", "it", "in", "New", "York?")]
KINDS = ("bert", "roberta", "t5", "llama")
TAGS = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")


def example(**fields: Any) -> Example:
    return Example(Record("dataset.sources[0].uri", "rows.jsonl", 7, {}), fields.pop("turns", ()), **fields)


def labelled(text: str, label: str) -> Example:
    return example(turns=(Turn("text", text),), label=label)


def asked(source: str, target: str) -> Example:
    return example(turns=(Turn("prompt", source), Turn("completion", target)))


def rules(**changes: Any) -> EncodingRules:
    return EncodingRules(
        **{"loss_on": LossOn.COMPLETION, "truncation": Truncation.ERROR, "max_length": 64, "labels": TAGS, **changes}
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tokenizer of each kind, trained on the texts."""
    return {kind: make_tokenizer(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def make_tokenizer(folder: Path, kind: str) -> Path:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    corpus = [*TEXTS, *(" ".join(words) for words in WORDS)]
    if kind == "bert":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        tokenizer.train_from_iterator(corpus, trainers.WordPieceTrainer(vocab_size=90, special_tokens=special))
        frame, names = "[CLS] $A [SEP]", {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]"}
    else:
        special = ["<pad>", "<s>", "</s>", "<unk>"]
        tokenizer = Tokenizer(models.BPE(unk_token=None if kind == "roberta" else "<unk>"))
        if kind == "roberta":
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
            tokenizer.decoder = decoders.ByteLevel()
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if kind == "llama" else "always")
            tokenizer.decoder = decoders.Metaspace()
        alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "roberta" else []
        trainer = trainers.BpeTrainer(
            vocab_size=340 if alphabet else 60, special_tokens=special, initial_alphabet=alphabet
        )
        tokenizer.train_from_iterator(corpus, trainer)
        frame = {"roberta": "<s> $A </s>", "t5": "$A </s>", "llama": "<s> $A"}[kind]
        names = {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "unk": "<unk>"}
    used = [(token, tokenizer.token_to_id(token)) for token in frame.split() if token != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=used)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **{f"{key}_token": token for key, token in names.items()}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def text_tokenizer(folder: Path) -> TextTokenizer:
    from finetune_trainer.sources.inspect import TokenizerFiles

    config = json.loads((folder / "tokenizer_config.json").read_text())
    return TextTokenizer.from_files(TokenizerFiles((folder / "tokenizer.json").read_bytes(), config, None))


def _stock(folder: str, calls: list[tuple[Any, dict[str, Any]]]) -> list[tuple[list[int], list[int | None]]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for given, options in calls:
        encoding = tokenizer(given, **options)
        found.append((encoding["input_ids"], encoding.word_ids()))
    return found


# ---- what the tokenizer puts round a text


@pytest.mark.parametrize("kind", KINDS)
def test_a_labelled_text_has_the_ids_of_the_stock_tokenizer_whole_and_cut(folders: dict[str, Path], kind: str) -> None:
    calls: list[tuple[Any, dict[str, Any]]] = [(text, {}) for text in TEXTS]
    calls += [(text, {"truncation": True, "max_length": 6}) for text in TEXTS]
    expected = [ids for ids, _ in in_child(_stock, str(folders[kind]), calls)]

    tokenizer = text_tokenizer(folders[kind])
    whole = LabelEncoder(tokenizer, rules(labels=("no", "yes")))
    cut = LabelEncoder(tokenizer, rules(labels=("no", "yes"), truncation=Truncation.TAIL, max_length=6))
    encodings = [encoder.encode(labelled(text, "yes")) for encoder in (whole, cut) for text in TEXTS]

    assert [encoding.example.input_ids.tolist() for encoding in encodings] == expected
    assert {encoding.example.label for encoding in encodings} == {1}
    lengths = [len(ids) for ids in expected]
    assert [encoding.cut for encoding in encodings] == [False] * 4 + [length > 6 for length in lengths[:4]]
    assert max(lengths[:4]) > 6 == max(lengths[4:])


@pytest.mark.parametrize("kind", ["bert", "roberta", "t5"])
def test_words_have_the_ids_of_the_stock_tokenizer_and_the_first_piece_carries_the_tag(
    folders: dict[str, Path], kind: str
) -> None:
    expected = in_child(_stock, str(folders[kind]), [(list(words), {"is_split_into_words": True}) for words in WORDS])
    encoder, further = TagEncoder(text_tokenizer(folders[kind]), rules()), 0
    for words, (ids, word_ids) in zip(WORDS, expected, strict=True):
        tags = [TAGS[k % len(TAGS)] for k in range(len(words))]
        item = encoder.encode(example(words=words, tags=tuple(tags))).example
        assert item.input_ids.tolist() == ids
        pairs = list(zip(word_ids, [None, *word_ids[:-1]], strict=True))
        first = [TAGS.index(tags[word]) if word is not None and word != before else -100 for word, before in pairs]
        assert item.labels.tolist() == first
        further += sum(word is not None and word == before for word, before in pairs)
    assert further > 0, "no word is of several pieces, so nothing is shown"


def test_a_llama_tokenizer_reads_words_as_running_text(folders: dict[str, Path]) -> None:
    running = [" ".join(words) for words in WORDS]
    expected = in_child(_stock, str(folders["llama"]), [(text, {}) for text in running])
    encoder = TagEncoder(text_tokenizer(folders["llama"]), rules())
    for words, (ids, _) in zip(WORDS, expected, strict=True):
        item = encoder.encode(example(words=words, tags=("O",) * len(words))).example
        assert item.input_ids.tolist() == ids
        assert (item.labels != -100).sum() == len(words)
        assert item.labels[0] == -100, "the BOS carries no tag"


@pytest.mark.parametrize("kind", ["t5", "roberta"])
def test_a_source_and_a_target_have_the_ids_of_the_stock_tokenizer(folders: dict[str, Path], kind: str) -> None:
    calls = [(text, {}) for text in TEXTS]
    expected = [ids for ids, _ in in_child(_stock, str(folders[kind]), calls)]
    encoder = Seq2SeqEncoder(text_tokenizer(folders[kind]), rules())
    for number, text in enumerate(TEXTS):
        item = encoder.encode(asked(text, TEXTS[-1 - number])).example
        assert item.input_ids.tolist() == expected[number]
        assert item.labels.tolist() == expected[-1 - number]


# ---- targets


@pytest.mark.parametrize("written", ["New York", "New York</s>", "New York</s></s>"])
def test_a_target_ends_with_the_end_token_exactly_once(folders: dict[str, Path], written: str) -> None:
    tokenizer = text_tokenizer(folders["t5"])
    item = Seq2SeqEncoder(tokenizer, rules()).encode(asked("Paris", written)).example
    assert item.labels.tolist().count(tokenizer.eos_id) == 1
    assert item.labels[-1] == tokenizer.eos_id


def test_source_and_target_have_limits_of_their_own(folders: dict[str, Path]) -> None:
    tokenizer = text_tokenizer(folders["t5"])
    cut = Seq2SeqEncoder(tokenizer, rules(truncation=Truncation.TAIL, max_source=5, max_target=4))
    encoding = cut.encode(asked(TEXTS[0], TEXTS[1]))
    assert (len(encoding.example.input_ids), len(encoding.example.labels)) == (5, 4)
    assert encoding.example.input_ids[-1] == encoding.example.labels[-1] == tokenizer.eos_id
    assert encoding.length - encoding.kept > 0 and encoding.cut

    refused = Seq2SeqEncoder(tokenizer, rules(max_source=60, max_target=4)).encode(asked(TEXTS[0], TEXTS[1]))
    assert isinstance(refused, BadRecord)
    assert re.fullmatch(r"the target has \d+ tokens, more than dataset.maxTargetTokens 4", refused.problem)
    assert refused.mend.startswith("Raise dataset.maxTargetTokens")
    wide = Seq2SeqEncoder(tokenizer, rules(truncation=Truncation.TAIL, max_length=6, max_source=60, max_target=4))
    bounded = wide.encode(asked(TEXTS[0], TEXTS[1])).example
    assert (len(bounded.input_ids), len(bounded.labels)) == (6, 4), "memory is planned for max_length"
    empty = Seq2SeqEncoder(tokenizer, rules()).encode(asked("Paris", "</s>"))
    assert isinstance(empty, BadRecord) and empty.problem == "the target has no token"


# ---- what cannot be used


def test_a_wrong_tag_or_label_is_named_with_its_row(folders: dict[str, Path]) -> None:
    tokenizer = text_tokenizer(folders["bert"])
    tags, labels = TagEncoder(tokenizer, rules()), LabelEncoder(tokenizer, rules(labels=("no", "yes")))
    found = [
        tags.encode(example(words=("Paris", "is"), tags=("B-LOC", "S-LOC"))),
        tags.encode(example(words=("Paris",), tags=("B-LOC", "O"))),
        tags.encode(example()),
        tags.encode(example(words=("Paris", "\x00"), tags=("O", "O"))),
        labels.encode(labelled("Paris", "maybe")),
        labels.encode(labelled(" ", "yes")),
        labels.encode(labelled(TEXTS[0] * 9, "yes")),
    ]
    assert [bad.problem for bad in found if isinstance(bad, BadRecord)] == [
        "the tag 'S-LOC' is not a BIO tag of this data",
        "1 words but 2 tags",
        "there is no word in it",
        "the tokenizer makes nothing of the word '\\x00'",
        "the label 'maybe' is not one of no, yes",
        "the text has no token",
        found[-1].problem,
    ]
    assert found[-1].problem.endswith("tokens, more than hyperparameters.maxSequenceLength 64")
    assert {bad.where for bad in found} == {"rows.jsonl line 7"}


def test_tags_that_are_cut_off_are_counted_and_the_special_tokens_stay(folders: dict[str, Path]) -> None:
    tokenizer = text_tokenizer(folders["bert"])
    encoder = TagEncoder(tokenizer, rules(truncation=Truncation.TAIL, max_length=6))
    encoding = encoder.encode(example(words=WORDS[0], tags=("B-PER", "I-PER", "O", "O", "B-LOC", "O")))
    assert encoding.kept == 6 and encoding.length > 6 and encoding.cut
    assert encoding.example.input_ids.tolist()[-1] == tokenizer.suffix[0]
    assert encoding.example.labels.tolist()[-1] == -100
    assert "⟦B-PER⟧" in encoder.show(encoding.example)


# ---- names


def test_labels_are_sorted_and_numbers_by_value() -> None:
    def names(*labels: str, base: tuple[str, ...] = ()) -> tuple[str, ...]:
        return label_names(Task.SEQUENCE_CLASSIFICATION, [labelled("x", label) for label in labels], base)

    assert names("pos", "neg", "pos") == ("neg", "pos")
    assert names("10", "2", "0") == ("0", "2", "10")
    assert names("neg", base=("pos", "neg", "neutral")) == ("pos", "neg", "neutral"), "the base's own order"
    assert names("neg", "other", base=("pos", "neg")) == ("neg", "other")
    with pytest.raises(FinetuneError, match="one label only \\('pos'\\)") as error:
        names("pos", "pos")
    assert error.value.failure_class == "DataInvalid"


def test_tags_have_o_first_and_both_parts_of_each_type() -> None:
    rows = [example(words=("a", "b"), tags=("B-LOC", "O")), example(words=("a",), tags=("I-PER",))]
    assert label_names(Task.TOKEN_CLASSIFICATION, rows) == TAGS
    with pytest.raises(FinetuneError, match="no tag but O"):
        label_names(Task.TOKEN_CLASSIFICATION, [example(words=("a",), tags=("O",))])


def test_label_names_of_a_base_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    named = {str(k): f"c{k}" for k in range(12)}
    (tmp_path / "config.json").write_text(json.dumps({"id2label": named}, sort_keys=True))
    assert base_labels(tmp_path / "none", tmp_path) == tuple(f"c{k}" for k in range(12))
    assert base_labels(tmp_path / "none") == ()

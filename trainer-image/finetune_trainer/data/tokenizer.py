"""A tokenizer reduced to what encoding needs, the same in the light image (tokenizer.json) and in the worker.

The post-processor is left out: it would add special tokens of its own and trim white space from offsets, so that a
token could not be told to lie inside or outside the loss. What it puts round a text is kept as `prefix` and `suffix`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from tokenizers import Encoding, Tokenizer

from finetune_api.failures import FinetuneError
from finetune_trainer.sources.inspect import TokenizerFiles


class PlacedTokens:
    """The tokens of a text, and which of them stands for a character."""

    def __init__(self, text: str, encoding: Encoding) -> None:
        """encoding: of text."""
        self._text = text
        self._encoding = encoding
        self.ids: list[int] = encoding.ids

    def reaching(self, place: int) -> int:
        """The first token that ends behind a character place; how many tokens there are if none does."""
        for at in range(place, len(self._text)):
            token: int | None = self._encoding.char_to_token(at)
            if token is not None:
                return token
        return len(self.ids)

    def beginning(self, place: int) -> int:
        """The first token that begins at a character place or behind it; how many there are if none does."""
        token = self.reaching(place)
        while token < len(self.ids) and self._encoding.token_to_chars(token)[0] < place:
            token += 1
        return token


@dataclass(frozen=True)
class TextTokenizer:
    """backend: without post-processor, truncation and padding.

    adds_bos: whether the tokenizer itself puts a BOS before a text. chat_template: Jinja source, None if there is none.
    variables: special tokens by name, as chat templates use them. special: texts of all special tokens.
    prefix, suffix: ids that the tokenizer itself puts before and after a text: [CLS] … [SEP], … </s>, <s> ….
    """

    backend: Tokenizer
    bos_id: int | None
    eos_id: int
    adds_bos: bool
    chat_template: str | None
    variables: Mapping[str, Any]
    special: frozenset[str]
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()

    @classmethod
    def from_transformers(cls, tokenizer: Any) -> Self:
        """From a transformers PreTrainedTokenizerFast; raises FinetuneError(ModelUnsupported) without an EOS token."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise _unsupported("the tokenizer is not a fast one; a tokenizer.json is needed")
        template = tokenizer.chat_template
        if isinstance(template, Mapping):
            template = template.get("default")
        return cls._build(backend, tokenizer.special_tokens_map, template, set(tokenizer.all_special_tokens))

    @classmethod
    def from_files(cls, files: TokenizerFiles) -> Self:
        """From the files of a model; raises FinetuneError(ModelUnsupported) if tokenizer.json is absent or broken."""
        if files.tokenizer_json is None:
            raise _unsupported("there is no tokenizer.json")
        try:
            backend = Tokenizer.from_buffer(files.tokenizer_json)
        except Exception as error:  # the library raises Exception itself
            raise _unsupported(f"tokenizer.json cannot be read: {error}") from None
        names = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
        variables = {name: _token_text(files.config.get(name)) for name in names}
        variables = {name: text for name, text in variables.items() if text is not None}
        return cls._build(backend, variables, files.chat_template, set(variables.values()))

    @classmethod
    def _build(cls, backend: Tokenizer, variables: Mapping[str, Any], template: str | None, special: set[Any]) -> Self:
        bare = Tokenizer.from_str(backend.to_str())
        bare.post_processor = None
        bare.no_truncation()
        bare.no_padding()
        # Encoders such as BERT have no end token of that name; their separator ends a text.
        bos, eos = variables.get("bos_token"), variables.get("eos_token") or variables.get("sep_token")
        bos_id = bare.token_to_id(bos) if bos else None
        eos_id = bare.token_to_id(eos) if eos else None
        if eos_id is None:
            raise _unsupported("the tokenizer has no eos_token, so the model could not learn to stop")
        adds_bos = bos_id is not None and backend.encode("a").ids[:1] == [bos_id]
        added = {token.content for token in bare.get_added_tokens_decoder().values() if token.special}
        texts = frozenset(text for text in added | special if isinstance(text, str) and text)
        prefix, suffix = _frame(backend, bare)
        return cls(bare, bos_id, eos_id, adds_bos, template or None, dict(variables), texts, prefix, suffix)

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """(ids, character ranges) of text; no special token is added."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def place_many(self, texts: Sequence[str]) -> list[PlacedTokens]:
        """The tokens of each text with their places; several texts at once are faster, and no list of ranges is made."""
        encodings = self.backend.encode_batch(texts, add_special_tokens=False)
        return [PlacedTokens(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]

    def framed(self, ids: list[int], limit: int) -> list[int]:
        """ids between prefix and suffix, the ids' tail cut so that all of it has at most limit tokens."""
        room = max(limit - len(self.prefix) - len(self.suffix), 0)
        return [*self.prefix, *ids[:room], *self.suffix]

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens included."""
        return self.backend.decode(ids, skip_special_tokens=False)

    def with_bos(self, ids: list[int]) -> int:
        """How many leading ids have to change so that there is exactly one BOS: 1 to add, a negative number to drop.

        A BOS belongs there if the tokenizer adds one by itself; one that the text begins with is never repeated.
        """
        leading = 0
        while leading < len(ids) and ids[leading] == self.bos_id:
            leading += 1
        if leading == 0:
            return 1 if self.adds_bos else 0
        return 1 - leading


def _frame(backend: Tokenizer, bare: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(prefix, suffix) of the post-processor, seen on a probe text."""
    inner, whole = bare.encode("a", add_special_tokens=False).ids, backend.encode("a").ids
    for start in range(len(whole) - len(inner) + 1):
        if whole[start : start + len(inner)] == inner:
            return tuple(whole[:start]), tuple(whole[start + len(inner) :])
    return (), ()


def _token_text(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _unsupported(why: str) -> FinetuneError:
    return FinetuneError(
        f"The base model cannot be used: {why}. Choose another model.",
        failure_class="ModelUnsupported",
        field="spec.model.uri",
    )

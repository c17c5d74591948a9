"""What preparing a data set leaves behind, beside its tables: statistics, prompts for evaluation, a sample."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self

from finetune_trainer.data.encode import Encoder, Encoding, as_array
from finetune_trainer.data.formats import Example
from finetune_trainer.data.kinds import EncodedExample, EncodedJudged, EncodedPair, EncodedPrompt, EncodedTarget

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from finetune_trainer.data.encoders import RecordEncoder


@dataclass(frozen=True, slots=True)
class HeldOutPrompt:
    """A prompt for the model to answer, with the answer that the data gives.

    prompt: what a person asked, without the template's marks; prompt_ids: all that the model sees. origin: where the
    record is. reference is empty where the data has no good answer.
    """

    prompt: str
    prompt_ids: NDArray[np.int32]
    reference: str
    origin: str

    def to_json(self) -> dict[str, Any]:
        """For the cache."""
        return {
            "prompt": self.prompt,
            "ids": self.prompt_ids.tolist(),
            "reference": self.reference,
            "origin": self.origin,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """From the cache."""
        return cls(content["prompt"], as_array(content["ids"]), content["reference"], content["origin"])


@dataclass
class DataStats:
    """What became of the data. Tokens are those that are trained on, after the cut.

    cut: records that were shortened; cut_tokens: tokens that this cost; left_out: records of which nothing to learn
    was left; bad_records: records that could not be used, the first of them in bad_rows; packing: how records share a
    sequence and why so, or why not, where it was asked for.
    """

    format: str = ""
    format_reason: str = ""
    prompt_form: str = ""
    train_records: int = 0
    validation_records: int = 0
    test_records: int = 0
    train_tokens: int = 0
    loss_tokens: int = 0
    longest_tokens: int = 0
    cut: int = 0
    cut_tokens: int = 0
    left_out: int = 0
    bad_records: int = 0
    bad_rows: list[str] = field(default_factory=list)
    records_by_source: dict[str, int] = field(default_factory=dict)
    packing: str = ""

    def to_json(self) -> dict[str, Any]:
        """For the report: camelCase names."""

        def camel(name: str) -> str:
            head, *rest = name.split("_")
            return head + "".join(word.capitalize() for word in rest)

        return {camel(name): value for name, value in asdict(self).items()}


def held_out_prompt(encoder: RecordEncoder, example: Example, encoding: Encoding) -> HeldOutPrompt | None:
    """What a model may be asked from a record, as the model sees it; None for records that ask nothing."""
    item = encoding.example
    reference = encoding.answer.strip()
    match item:
        case EncodedExample() if isinstance(encoder, Encoder) and encoding.prompt < len(item.input_ids):
            found, reference = encoder.prompt_of(encoding)
            ids = as_array(found)
        case EncodedPair():
            ids = item.chosen_ids[: encoding.prompt]
        case EncodedJudged():
            ids, reference = item.input_ids[: encoding.prompt], reference if item.desirable else ""
        case EncodedPrompt() | EncodedTarget():
            ids = item.input_ids
        case _:
            return None
    asked = [turn.text for turn in example.turns if turn.role in ("user", "prompt")]
    text = asked[-1] if asked else encoder.tokenizer.decode(ids.tolist())
    return HeldOutPrompt(text.strip(), ids, reference, example.record.where)

"""The base classes of every document that crosses a process boundary."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, Self

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel


def is_empty(value: Sized) -> bool:
    """Leaves a map out of the JSON form (exclude_if): server-side apply turns one that has become empty into null."""
    return len(value) == 0


class Document(BaseModel):
    """A frozen value with camelCase JSON names that refuses unknown fields."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        ser_json_inf_nan="null",
        use_attribute_docstrings=True,
    )

    def to_json(self) -> dict[str, Any]:
        """The JSON form: camelCase names, absent where the value is None."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Parse the JSON form; raises pydantic.ValidationError with the path of each fault."""
        return cls.model_validate(value)


class Tolerant(Document):
    """A document that an older or newer release may have written: unknown fields are dropped."""

    model_config = ConfigDict(extra="ignore")

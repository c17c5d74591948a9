"""URIs of models, data and outputs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast

from finetune_api.failures import FinetuneError
from finetune_api.fields import DNS_SUBDOMAIN

Scheme = Literal["hf", "s3", "pvc", "file"]


@dataclass(frozen=True)
class Uri:
    """A parsed URI.

    container: the bucket of s3://, the claim of pvc://, `owner/name` of hf://, empty for file://.
    path: what follows, without a leading slash (file:// keeps it absolute).
    dataset: whether an hf:// URI names a dataset (hf://datasets/owner/name).
    """

    scheme: Scheme
    container: str
    path: str
    dataset: bool = False

    def __str__(self) -> str:
        if self.scheme == "file":
            return f"file://{self.path}"
        prefix = "datasets/" if self.dataset else ""
        tail = f"/{self.path}" if self.path else ""
        return f"{self.scheme}://{prefix}{self.container}{tail}"

    def child(self, name: str) -> Uri:
        """The URI of name below this one."""
        path = f"{self.path.rstrip('/')}/{name}" if self.path else name
        return Uri(self.scheme, self.container, path, self.dataset)


def parse_uri(text: str, *, field: str) -> Uri:
    """Parse text; raises FinetuneError(InvalidSpec) that names field and the expected form."""
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in ("hf", "s3", "pvc", "file"):
        raise _invalid(text, field, "begin with hf://, s3://, pvc:// or file://")
    if ".." in rest.split("/"):
        raise _invalid(text, field, "hold no '..'")
    if scheme == "file":
        if not rest.startswith("/"):
            raise _invalid(text, field, "be file:///absolute/path")
        return Uri("file", "", rest)
    rest = rest.rstrip("/")
    if scheme == "hf":
        dataset = rest.startswith("datasets/")
        parts = rest.removeprefix("datasets/").split("/", 2)
        if len(parts) < 2 or not all(parts[:2]):
            raise _invalid(text, field, "be hf://owner/name or hf://datasets/owner/name")
        return Uri("hf", "/".join(parts[:2]), parts[2] if len(parts) > 2 else "", dataset)
    container, _, path = rest.partition("/")
    if not container:
        raise _invalid(text, field, f"be {scheme}://{'bucket' if scheme == 's3' else 'claim'}/path")
    if scheme == "pvc" and not re.fullmatch(DNS_SUBDOMAIN, container):
        raise _invalid(text, field, "name the claim in lower-case letters, digits, '-' and '.'")
    return Uri(cast(Scheme, scheme), container, path)


def _invalid(text: str, field: str, must: str) -> FinetuneError:
    return FinetuneError(f"{field} is {text!r}; it must {must}", failure_class="InvalidSpec", field=f"spec.{field}")

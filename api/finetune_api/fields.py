"""Field types shared by the custom resources: bounded strings and numbers.

Every string and list has a bound, because the API server estimates the cost of CEL rules from them.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

DNS_LABEL = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
DNS_SUBDOMAIN = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
MODEL_URI = r"^(hf|s3|pvc|file)://[^\s?#]+$"
DATA_URI = r"^(hf|s3|pvc|file)://[^\s?#]+$"
OUTPUT_URI = r"^(s3|pvc|file)://[^\s?#]+$"
ENDPOINT = r"^https?://[^\s/?#]+(/[^\s?#]*)?$"

ObjectName = Annotated[str, StringConstraints(min_length=1, max_length=253, pattern=DNS_SUBDOMAIN)]
LabelName = Annotated[str, StringConstraints(min_length=1, max_length=63, pattern=DNS_LABEL)]
ModelUri = Annotated[str, StringConstraints(max_length=1024, pattern=MODEL_URI)]
DataUri = Annotated[str, StringConstraints(max_length=1024, pattern=DATA_URI)]
OutputUri = Annotated[str, StringConstraints(max_length=1024, pattern=OUTPUT_URI)]
Endpoint = Annotated[str, StringConstraints(max_length=512, pattern=ENDPOINT)]
ShortText = Annotated[str, StringConstraints(min_length=1, max_length=256)]
LongText = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
Pattern = Annotated[str, StringConstraints(min_length=1, max_length=256)]

Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
NonNegative = Annotated[int, Field(ge=0, le=2**31 - 1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0, le=1)]

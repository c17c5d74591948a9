"""Settings of the operator process: parsed once from the environment, unknown names refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from pydantic import ValidationError

from finetune_api.job import Storage

PREFIX = "FINETUNE_OPERATOR_"


class ConfigError(ValueError):
    """A setting is missing, unknown or malformed; the message names the variable."""


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("must be true or false")
    return text == "true"


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 10**7:
        raise ValueError("must be a positive number of seconds")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError("must not be negative")
    return value


def _one_of(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return text

    return parse


def _setting(parse: Callable[[str], Any], default: Any = MISSING) -> Any:
    if default is MISSING:
        return field(metadata={"parse": parse})
    return field(default=default, metadata={"parse": parse})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every setting of the operator. A field `some_name` is read from FINETUNE_OPERATOR_SOME_NAME.

    Seconds are floats. `retry_base_seconds · 2^(n−1)`, at most `retry_max_seconds`, passes before attempt n + 1.
    """

    trainer_image: str = _setting(str)
    preflight_image: str = _setting(str)
    image_pull_policy: str = _setting(_one_of("Always", "IfNotPresent", "Never"), "IfNotPresent")
    image_pull_secrets: tuple[str, ...] = _setting(_names, ())
    hub_endpoint: str | None = _setting(str, None)
    """URL of a mirror of the Hugging Face hub."""

    namespace: str = _setting(str, "finetune-system")
    watch_namespaces: tuple[str, ...] = _setting(_names, ())
    """Empty means all."""
    identity: str = _setting(str)
    """Names this process in the Lease; no two processes may share it."""

    lease_name: str = _setting(str, "finetune-operator")
    lease_duration_seconds: float = _setting(_seconds, 15.0)
    lease_renew_seconds: float = _setting(_seconds, 10.0)
    """Without a renewal for this long the process ends."""
    lease_retry_seconds: float = _setting(_seconds, 2.0)

    storage_endpoint: str | None = _setting(str, None)
    storage_region: str | None = _setting(str, None)
    storage_path_style: bool | None = _setting(_flag, None)
    storage_ca_config_map: str | None = _setting(str, None)

    log_level: str = _setting(_one_of("debug", "info", "warning", "error"), "info")
    log_format: str = _setting(_one_of("json", "text"), "json")
    http_host: str = _setting(str, "0.0.0.0")  # noqa: S104  probes and Prometheus reach the pod by its own address
    http_port: int = _setting(_count, 8080)

    workers: int = _setting(_count, 8)
    resync_seconds: float = _setting(_seconds, 600.0)
    retry_base_seconds: float = _setting(_seconds, 10.0)
    retry_max_seconds: float = _setting(_seconds, 600.0)
    poll_seconds: float = _setting(_seconds, 5.0)
    """How often something that no watch reports (events, nodes) is looked at again."""
    preflight_start_seconds: float = _setting(_seconds, 300.0)
    preflight_timeout_seconds: float = _setting(_seconds, 900.0)
    node_lost_seconds: float = _setting(_seconds, 30.0)
    progress_interval_seconds: float = _setting(_seconds, 10.0)
    progress_writes_per_second: float = _setting(_seconds, 20.0)
    pools_resync_seconds: float = _setting(_seconds, 300.0)

    def __post_init__(self) -> None:
        if not self.lease_retry_seconds < self.lease_renew_seconds < self.lease_duration_seconds:
            raise ConfigError(
                f"{PREFIX}LEASE_RETRY_SECONDS ({self.lease_retry_seconds:g}) < _RENEW_SECONDS "
                f"({self.lease_renew_seconds:g}) < _DURATION_SECONDS ({self.lease_duration_seconds:g}) must hold"
            )
        if self.workers < 1:
            raise ConfigError(f"{PREFIX}WORKERS must be at least 1")
        try:
            _ = self.storage
        except ValidationError as error:
            raise ConfigError(f"{PREFIX}STORAGE_*: {error}") from error

    @property
    def storage(self) -> Storage:
        """What fills the storage settings that a job leaves out."""
        return Storage(
            endpoint=self.storage_endpoint,
            region=self.storage_region,
            path_style=self.storage_path_style,
            ca_config_map_name=self.storage_ca_config_map,
        )


def parse_config(environ: Mapping[str, str], *, identity: str) -> Config:
    """The settings in environ; raises ConfigError for a missing, unknown or malformed one. Empty counts as absent.

    `identity` is taken where environ has none.
    """
    known = {PREFIX + item.name.upper(): item for item in fields(Config)}
    given = {name: text for name, text in environ.items() if name.startswith(PREFIX) and text != ""}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConfigError(f"unknown setting {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    values: dict[str, Any] = {"identity": identity}
    for name, item in known.items():
        if name in given:
            try:
                values[item.name] = item.metadata["parse"](given[name])
            except ValueError as error:
                raise ConfigError(f"{name}={given[name]!r}: {error}") from error
        elif item.default is MISSING and item.name not in values:
            raise ConfigError(f"{name} is missing")
    return Config(**values)

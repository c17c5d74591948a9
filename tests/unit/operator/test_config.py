"""Settings come from the environment, once, and a wrong one is told by name."""

from __future__ import annotations

import pytest

from finetune_operator.config import PREFIX, ConfigError, parse_config

IMAGES = {f"{PREFIX}TRAINER_IMAGE": "t:1", f"{PREFIX}PREFLIGHT_IMAGE": "p:1"}


def test_defaults_fill_what_is_absent_or_empty() -> None:
    config = parse_config({**IMAGES, f"{PREFIX}WATCH_NAMESPACES": "", "HOME": "/root"}, identity="pod-1")
    assert config.watch_namespaces == ()
    assert config.namespace == "finetune-system"
    assert config.identity == "pod-1"


def test_values_are_parsed() -> None:
    config = parse_config(
        {
            **IMAGES,
            f"{PREFIX}WATCH_NAMESPACES": "team-a, team-b",
            f"{PREFIX}STORAGE_PATH_STYLE": "true",
            f"{PREFIX}STORAGE_ENDPOINT": "https://s3.test:9000",
            f"{PREFIX}RETRY_BASE_SECONDS": "0.5",
        },
        identity="pod-1",
    )
    assert config.watch_namespaces == ("team-a", "team-b")
    assert config.storage.to_json() == {"endpoint": "https://s3.test:9000", "pathStyle": True}
    assert config.retry_base_seconds == 0.5


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({f"{PREFIX}TRAINER_IMAGE": "t:1"}, "PREFLIGHT_IMAGE is missing"),
        ({**IMAGES, f"{PREFIX}WORKRES": "3"}, "WORKRES"),
        ({**IMAGES, f"{PREFIX}WORKERS": "0"}, "WORKERS"),
        ({**IMAGES, f"{PREFIX}WORKERS": "many"}, "WORKERS"),
        ({**IMAGES, f"{PREFIX}STORAGE_PATH_STYLE": "yes"}, "true or false"),
        ({**IMAGES, f"{PREFIX}STORAGE_ENDPOINT": "s3.test"}, "STORAGE_"),
        ({**IMAGES, f"{PREFIX}RETRY_BASE_SECONDS": "-1"}, "RETRY_BASE_SECONDS"),
        ({**IMAGES, f"{PREFIX}RETRY_BASE_SECONDS": "nan"}, "RETRY_BASE_SECONDS"),
        ({**IMAGES, f"{PREFIX}IMAGE_PULL_POLICY": "Sometimes"}, "Always, IfNotPresent, Never"),
        ({**IMAGES, f"{PREFIX}LEASE_RENEW_SECONDS": "30"}, "DURATION_SECONDS"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(variables: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_config(variables, identity="pod-1")

"""Configurations."""

from __future__ import annotations

import dataclasses

import pytest

from baton.base.config import GatewayConfig, WorkerConfig
from baton.lab.config import BenchConfig


@pytest.mark.parametrize("config", [GatewayConfig, WorkerConfig, BenchConfig])
def test_no_key_is_shown(config: type) -> None:
    names = [
        field.name for field in dataclasses.fields(config) if field.name.endswith("_key") and "tls" not in field.name
    ]
    assert names
    shown = repr(config(**dict.fromkeys(names, "hunter2")))
    assert "hunter2" not in shown
    assert "port" in shown or "url" in shown

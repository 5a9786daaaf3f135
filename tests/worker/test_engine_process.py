"""Where engines are placed, before anything heavy happens."""

from __future__ import annotations

import pytest

from baton.base.config import DisaggConfig, EngineConfig
from baton.base.errors import ConfigError
from baton.worker.engine_process import placed


def test_an_undivided_engine_goes_where_it_wants() -> None:
    for device in ("auto", "cpu", "cuda:1"):
        assert placed(EngineConfig(device=device), DisaggConfig(mode="null")).device == device


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_hand_over_is_between_pools_in_host_memory(mode: str) -> None:
    disagg = DisaggConfig(mode=mode)
    assert placed(EngineConfig(device="auto"), disagg).device == "cpu"
    assert placed(EngineConfig(device="cpu"), disagg).device == "cpu"
    with pytest.raises(ConfigError, match="--device cpu"):
        placed(EngineConfig(device="cuda"), disagg)

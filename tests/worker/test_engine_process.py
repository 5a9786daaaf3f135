"""Where engines are placed, before anything heavy happens."""

from __future__ import annotations

import select
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from baton.base.clock import MonotonicClock
from baton.base.config import DisaggConfig, EngineConfig
from baton.base.errors import ConfigError
from baton.base.messages import Failed, Generate, Grammar, Sampling, Tokens
from baton.worker.channel import Waker
from baton.worker.engine_process import assemble, placed
from tests import tiny_model


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


def test_an_assembled_engine_compiles_grammars_beside_its_work(tmp_path: Path) -> None:
    """From the configuration to the token, and to the end of its threads (which `conftest` counts)."""
    waker = Waker()
    config = EngineConfig(model=str(tiny_model.write(tmp_path)), kv_pages=64, threads=1, device="cpu")
    assembly = assemble(config, DisaggConfig(), waker, MonotonicClock())
    engine = assembly.engine
    tokens: list[int] = []
    failed: dict[str, Failed] = {}
    for id, source in (("good", '["baton"]'), ("bad", "[]")):
        sampling = Sampling(64, grammar=Grammar("choice", source))
        assert not engine.handle(Generate(id, (1, 2, 3), sampling))
    finished = False
    while not (finished and failed):
        select.select([waker], [], [], 0.01 if engine.busy else 10)
        waker.clear()
        for message in engine.step():
            if isinstance(message, Failed):
                failed[message.id] = message
            elif isinstance(message, Tokens):
                tokens += message.tokens
                finished = message.finish is not None
    assembly.close()
    waker.close()
    assert (failed["bad"].status, failed["bad"].param) == (400, None)
    assert "the choice cannot be used" in failed["bad"].message
    ends = engine.role.committer.eos_token_ids  # type: ignore[attr-defined]
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).decode([t for t in tokens if t not in ends]) == "baton"

"""Fusions stay only where they are proven; everything else stays as it is and still works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from baton.base.config import EngineConfig
from baton.engine.attention import IMPLEMENTATION
from baton.engine.fuse import ForeignMlp, LeanLayer, Mlp, Plug, fuse
from baton.engine.kernels import Team
from baton.engine.load import build_runner, kv_layout, load_model, read_config, resolve, shape_of

from .drive import drive, engine_of, request, texts
from .models import FAMILIES, make


def loaded(path: Path) -> tuple[nn.Module, Any]:
    config = EngineConfig(model=str(path), threads=1)
    resolved, settings = resolve(config), read_config(path)
    return load_model(settings, resolved, "auto"), kv_layout(shape_of(settings), resolved, config)


def layers_of(model: nn.Module) -> list[nn.Module]:
    return list(model.model.layers)  # type: ignore[union-attr,arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_known_families_becomes_lean(family: str, tmp_path: Path) -> None:
    model, layout = loaded(make(family, tmp_path))
    specs = fuse(model, layout, 6, Team(1))
    lean = [layer for layer in layers_of(model) if isinstance(layer, LeanLayer)]
    assert len(lean) == len(specs) == layout.layers
    experts = [isinstance(layer.mlp, ForeignMlp) for layer in lean]
    assert experts == ([True, False, True] if family == "qwen3_moe" else [False] * len(lean))
    assert all(isinstance(layer.mlp, Mlp | ForeignMlp) for layer in lean)
    assert not [m for m in model.modules() if "RMSNorm" in type(m).__name__]


def test_windows_and_soft_caps_are_heard_from_the_model(tmp_path: Path) -> None:
    model, layout = loaded(make("gemma2", tmp_path))
    specs = fuse(model, layout, 6, Team(1))
    assert [specs[layer].window for layer in range(4)] == [13, 0, 13, 0]
    assert {spec.softcap for spec in specs.values()} == {2.0}
    assert {spec.scale for spec in specs.values()} == {24**-0.5}


class Twisted(nn.Module):
    """A layer with all the parts we know, wired otherwise: the residual is halved."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name, child in layer.named_children():
            self.add_module(name, child)
        self._wiring = [layer]  # in a list: not a child

    def forward(self, hidden_states: Tensor, **settings: Any) -> Tensor:
        output: Tensor = self._wiring[0](hidden_states, **settings)
        return output - 0.5 * hidden_states


def test_known_parts_wired_otherwise_are_left_alone(tmp_path: Path) -> None:
    model, layout = loaded(make("llama", tmp_path))
    model.model.layers[1] = Twisted(model.model.layers[1])  # type: ignore[union-attr,operator,index]
    fuse(model, layout, 6, Team(1))
    assert [type(layer).__name__ for layer in layers_of(model)] == ["LeanLayer", "Twisted", "LeanLayer"]


def test_a_layer_with_a_part_more_is_left_alone(tmp_path: Path) -> None:
    model, layout = loaded(make("llama", tmp_path))
    layers_of(model)[0].extra = nn.Linear(2, 2)
    fuse(model, layout, 6, Team(1))
    assert [isinstance(layer, LeanLayer) for layer in layers_of(model)] == [False, True, True]


def test_an_unfused_family_still_equals_generate(tmp_path: Path) -> None:
    """OLMo 2 norms after its parts only, and normalises queries over all heads: nothing here knows it."""
    from transformers import Olmo2Config

    from .models import TINY, generate

    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(Olmo2Config(**TINY), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    built = build_runner(EngineConfig(model=str(tmp_path), kv_pages=16, threads=1))
    prompts = [[5, 9, 11, 40, 3, 77], [8] * 3 + [100, 20]]
    heard = texts(drive(engine_of(built, chunk=4), [request(str(i), p, 20) for i, p in enumerate(prompts)]))
    assert list(heard.values()) == [generate(tmp_path, prompt, 20) for prompt in prompts]
    assert any(isinstance(m, Plug) for m in built.runner.forward.model.modules())  # type: ignore[attr-defined]
    assert IMPLEMENTATION in built.runner.forward.model.config._attn_implementation  # type: ignore[attr-defined]

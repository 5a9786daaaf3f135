"""The door between Transformers' model code and our attention.

Models whose config says `IMPLEMENTATION` call `paged_attention` in every layer, with what we handed to the model's
forward as `step`. No mask is ever made: Transformers makes none for an implementation without a mask function.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from baton.base.errors import ConfigError
from baton.engine.attention.base import Spec, Step

IMPLEMENTATION = "baton_paged"

FOREIGN = ("s_aux", "position_bias", "indices", "block_mask")
"""Arguments that change the result and that no kernel of ours knows; a model that passes one is refused."""


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    step: Step,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, rows, head_dim], key and value [1, kv_heads, rows, head_dim] -> [1, rows, heads, head_dim]."""
    for name in FOREIGN:
        if rest.get(name) is not None:
            raise ConfigError(f"{type(module).__name__} uses attention with {name}, which this engine does not know")
    if not module.is_causal:
        raise ConfigError(f"{type(module).__name__} attends in both directions; this engine generates text")
    spec = Spec(
        _layer(module), query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window or 0, softcap or 0.0
    )
    output = step.attend(spec, *(tensor[0].transpose(0, 1) for tensor in (query, key, value)))
    return output[None], None


def _layer(module: nn.Module) -> int:
    layer = module.layer_idx
    assert isinstance(layer, int)
    return layer


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, paged_attention)

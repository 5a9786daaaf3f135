"""Fusions put on a finished Transformers model from outside.

A decoder layer is recognised by its parts (norms, q/k/v/o projections, a gated MLP), rebuilt lean, and *proven*: both
run on random input, and the lean one stays only if it says the same. A layer with other parts, or with the same parts
wired otherwise, stays as it is and still works.

    norm ─▶ qkv (one product) ─▶ head norms, rotation, KV write, attention (one call) ─▶ o + residual
    norm ─▶ gate and up (one product) ─▶ activation * up ─▶ down + residual
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from baton.base.layout import KVLayout
from baton.engine.attention import HeadTransform, PlainAttention, Rows, Spec, Step
from baton.engine.kernels import Team
from baton.engine.kv_pool import KVPool
from baton.engine.quantize import Projection
from baton.engine.rowwise import Gate, Norm, activation_name

PROBE_ROWS = 6
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
"""How far a lean layer may be from the one it replaces, as a share of the largest value."""


class Mlp(nn.Module):
    """down(activation(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, gate_up: Projection, gate: Gate, down: Projection) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.gate = gate
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.gate(self.gate_up(x)))
        return y

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.down.plus(self.gate(self.gate_up(x)), residual)


class AnyMlp(nn.Module):
    """A feed-forward part that we know nothing of (mixture of experts), with the interface of ours."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x[None])
        first: Tensor = y[0] if isinstance(y, Tensor) else y[0][0]
        return first

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self(x)


class Around(nn.Module):
    """The norm before a part, and the one after it where there is one: x + after(part(before(x)))."""

    def __init__(self, before: Norm, after: Norm | None) -> None:
        super().__init__()
        self.before = before
        self.after = after

    def join(self, part: Projection | Mlp | AnyMlp, y: Tensor, residual: Tensor) -> Tensor:
        return part.plus(y, residual) if self.after is None else self.after.plus(part(y), residual)


class LeanLayer(nn.Module):
    """One decoder layer in eight calls."""

    def __init__(
        self,
        spec: Spec,
        qkv: Projection,
        head_norms: tuple[Norm, Norm] | None,
        output: Projection,
        mlp: Mlp | AnyMlp,
        around_attention: Around,
        around_mlp: Around,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.qkv = qkv
        self.head_norms = nn.ModuleList(head_norms or ())
        self.output = output
        self.mlp = mlp
        self.around_attention = around_attention
        self.around_mlp = around_mlp

    def forward(
        self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], step: Step, **_: Any
    ) -> Tensor:
        x = hidden_states[0]
        merged = self.qkv(self.around_attention.before(x))
        attended = step.attend_merged(self.spec, merged, self._transform(*position_embeddings))
        x = self.around_attention.join(self.output, attended, x)
        x = self.around_mlp.join(self.mlp, self.around_mlp.before(x), x)
        return x[None]

    def _transform(self, cos: Tensor, sin: Tensor) -> HeadTransform:
        if not self.head_norms:
            return HeadTransform(cos[0], sin[0])
        query, key = self.head_norms
        return HeadTransform(cos[0], sin[0], query.weight, key.weight, query.eps)


# --- proof -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Seen:
    """What a decoder layer was given and said in the probe."""

    hidden_states: Tensor
    settings: dict[str, Any]
    output: Any


class Recorder:
    """A step that notes with which `Spec` each layer calls for attention."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self.specs: dict[int, Spec] = {}

    def attend(self, spec: Spec, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.specs[spec.layer] = spec
        return self._step.attend(spec, query, key, value)

    def attend_merged(self, spec: Spec, merged: Tensor, transform: HeadTransform) -> Tensor:
        return self._step.attend_merged(spec, merged, transform)


def fuse(model: nn.Module, layout: KVLayout, heads: int, team: Team | None) -> dict[int, Spec]:
    """Replace what is recognised and proven; returns how each layer calls for attention.

    `layout` is the KV pool's (its page size and dtype do not matter here). A team: CPU kernels in float32.
    """
    with torch.inference_mode(False), torch.no_grad():
        recorder, seen = _probe(model, layout, heads)
        for layers, index in list(_decoder_layers(model)):
            layer = layers[index]
            if layer in seen:
                lean = _lean(layer, recorder.specs, team)
                if lean is not None and _same(lean, seen[layer]):
                    layers[index] = lean
        _replace_norms(model, team)
    return recorder.specs


def _probe(model: nn.Module, layout: KVLayout, heads: int) -> tuple[Recorder, dict[nn.Module, Seen]]:
    """Run the model once over a few tokens and listen at its decoder layers."""
    parameter = next(model.parameters())
    dtype = str(parameter.dtype).removeprefix("torch.")
    tiny = KVLayout("", layout.layers, layout.kv_heads, layout.head_dim, PROBE_ROWS, dtype)
    positions = np.arange(PROBE_ROWS, dtype=np.int64)
    one = np.ones(1, np.int32)
    rows = Rows(positions, np.zeros((1, 1), np.int32), one * 0, one * PROBE_ROWS, one * 0, 0)
    recorder = Recorder(PlainAttention(KVPool(tiny, 1, device=parameter.device), heads).begin(rows))
    seen: dict[nn.Module, Seen] = {}

    def listen(layer: nn.Module, args: tuple[Any, ...], settings: dict[str, Any], output: Any) -> None:
        if len(args) == 1:
            seen[layer] = Seen(args[0], settings, output)

    hooks = [l[i].register_forward_hook(listen, with_kwargs=True) for l, i in _decoder_layers(model)]
    tokens = torch.arange(PROBE_ROWS, device=parameter.device) + 3
    model(
        input_ids=tokens[None],
        position_ids=torch.from_numpy(positions).to(parameter.device)[None],
        use_cache=False,
        step=recorder,
    )
    for hook in hooks:
        hook.remove()
    return recorder, seen


def _decoder_layers(model: nn.Module) -> Iterator[tuple[nn.ModuleList, int]]:
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            yield from ((module, index) for index, layer in enumerate(module) if hasattr(layer, "self_attn"))


def _same(lean: LeanLayer, seen: Seen) -> bool:
    if not isinstance(seen.output, Tensor):
        return False
    output = lean(seen.hidden_states, **seen.settings)
    distance = (output - seen.output).abs().max()
    return bool(distance <= TOLERANCES[output.dtype] * seen.output.abs().max())


# --- recognition -------------------------------------------------------------------------------------------------


def _lean(layer: nn.Module, specs: dict[int, Spec], team: Team | None) -> LeanLayer | None:
    """The lean twin of a layer that has the parts we know; sharing its weights where it can."""
    attention, mlp = layer.self_attn, layer.mlp if hasattr(layer, "mlp") else None
    parts = dict(attention.named_children())
    linears = [parts.pop(name, None) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    head_norms = [_norm(parts.pop(name), team) for name in ("q_norm", "k_norm") if name in parts]
    around = _around(layer, team)
    spec = specs.get(attention.layer_idx)
    known = all(type(linear) is nn.Linear for linear in linears) and not parts and len(head_norms) in (0, 2)
    if not known or mlp is None or around is None or spec is None or None in head_norms:
        return None
    query, key, value, output = linears
    return LeanLayer(
        spec,
        Projection.merged([query, key, value]),
        (head_norms[0], head_norms[1]) if head_norms else None,
        Projection.merged([output]),
        _mlp(mlp, team),
        *around,
    )


def _around(layer: nn.Module, team: Team | None) -> tuple[Around, Around] | None:
    """Llama's two norms, or Gemma's four; None for anything else."""
    norms = {name: _norm(child, team) for name, child in layer.named_children() if name not in ("self_attn", "mlp")}
    first, second = norms.pop("input_layernorm", None), norms.pop("post_attention_layernorm", None)
    third, fourth = norms.pop("pre_feedforward_layernorm", None), norms.pop("post_feedforward_layernorm", None)
    if first is None or second is None or norms or (third is None) != (fourth is None):
        return None
    if third is None:
        return Around(first, None), Around(second, None)
    return Around(first, second), Around(third, fourth)


def _mlp(module: nn.Module, team: Team | None) -> Mlp | AnyMlp:
    parts = dict(module.named_children())
    linears = [parts.pop(name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    activation = parts.pop("act_fn", None)
    if parts or activation is None or not all(type(linear) is nn.Linear for linear in linears):
        return AnyMlp(module)
    name = activation_name(activation)
    if name is None:
        return AnyMlp(module)
    return Mlp(Projection.merged(linears[:2]), Gate(name, team), Projection.merged(linears[2:]))


def _replace_norms(model: nn.Module, team: Team | None) -> None:
    """Those outside of lean layers: the last one, and all in layers that stay as they are."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            norm = None if isinstance(child, Norm) else _norm(child, team)
            if norm is not None:
                setattr(parent, name, norm)


def _norm(module: nn.Module, team: Team | None) -> Norm | None:
    """`module` as a `Norm` if it is an RMS norm: with its weight, or with 1 + its weight as in Gemma."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if "RMSNorm" not in type(module).__name__ or not isinstance(weight, Tensor) or weight.dim() != 1 or not eps:
        return None
    x = torch.linspace(-2, 3, 3 * len(weight), device=weight.device).view(3, -1).to(weight.dtype)
    expected = module(x)
    for candidate in (weight.data, 1.0 + weight.data.float()):
        norm = Norm(candidate, eps, team)
        if (norm(x) - expected).abs().max() <= TOLERANCES[weight.dtype] * expected.abs().max():
            return norm
    return None

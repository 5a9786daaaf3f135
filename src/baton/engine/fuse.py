"""Fusions put on a finished Transformers model from outside.

A decoder layer is recognised by its parts (norms, q/k/v/o projections, a gated MLP), rebuilt lean, and *proven*: both
run on random input, and the lean one stays only if it says the same. A layer with other parts, or with the same parts
wired otherwise, stays as it is and still works.

    norm ─▶ qkv (one product) ─▶ head norms, rotation, KV write, attention (one call) ─▶ o + residual
    norm ─▶ gate and up (one product) ─▶ activation * up ─▶ down + residual
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from baton.base.layout import KVLayout
from baton.engine.attention import HeadTransform, PlainAttention, Rows, Spec, Step
from baton.engine.kernels import Team
from baton.engine.kv_pool import KVPool
from baton.engine.quantize import Projection, best_projection
from baton.engine.rowwise import Gate, Norm, activation_name

PROBE_ROWS = 6
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
"""How far a lean layer may be from the one it replaces, as a share of the largest value."""

Convert = Callable[[Projection], Projection]


class Mlp:
    """down(activation(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, gate_up: Projection, gate: Gate, down: Projection) -> None:
        self.gate_up = gate_up
        self.gate = gate
        self.down = down

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.gate(self.gate_up(x)))

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.down.plus(self.gate(self.gate_up(x)), residual)

    def convert(self, best: Convert) -> None:
        self.gate_up, self.down = best(self.gate_up), best(self.down)


class ForeignMlp:
    """A feed-forward part that we do not take apart (a mixture of experts), behind the interface of ours."""

    def __init__(self, inner: nn.Module) -> None:
        self.inner = inner

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x[None])
        return y[0]

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self(x)

    def convert(self, best: Convert) -> None:
        _convert_linears(self.inner, best)


class Around:
    """The norm before a part, and the one after it where there is one: x + after(part(before(x)))."""

    def __init__(self, before: Norm, after: Norm | None) -> None:
        self.before = before
        self.after = after

    def join(self, part: Projection | Mlp | ForeignMlp, y: Tensor, residual: Tensor) -> Tensor:
        return part.plus(y, residual) if self.after is None else self.after.plus(part(y), residual)


class LeanLayer(nn.Module):
    """One decoder layer in eight calls. Its parts are plain objects: looking them up in a module costs more than
    a small kernel does."""

    def __init__(
        self,
        spec: Spec,
        qkv: Projection,
        head_norms: tuple[Norm, Norm] | None,
        output: Projection,
        mlp: Mlp | ForeignMlp,
        around: tuple[Around, Around],
    ) -> None:
        super().__init__()
        self.spec = spec
        self.qkv = qkv
        self.head_norms = head_norms
        self.output = output
        self.mlp = mlp
        self.around_attention, self.around_mlp = around

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
        if self.head_norms is None:
            return HeadTransform(cos, sin)
        query, key = self.head_norms
        return HeadTransform(cos, sin, query.weight, key.weight, query.eps)

    def convert(self, best: Convert) -> None:
        self.qkv, self.output = best(self.qkv), best(self.output)
        self.mlp.convert(best)


class Plug(nn.Module):
    """One of our parts in the place of a module: [..., inputs] -> [..., outputs]."""

    def __init__(self, part: Projection | Norm) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x.reshape(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], y.shape[-1])


def convert_linears(model: nn.Module, weight_dtype: str, team: Team) -> None:
    """Every linear layer of a fused float32 CPU model in its fastest form, one after another."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    _convert_linears(model, lambda linear: best_projection(linear, weight_dtype, team), head)
    for parent, name in _places_of(model, head):
        best = best_projection(Projection.merged([head]), weight_dtype, team, is_head=True)
        setattr(parent, name, Plug(best))


def _convert_linears(model: nn.Module, best: Convert, head: nn.Module | None = None) -> None:
    for parent in list(model.modules()):
        if isinstance(parent, LeanLayer):
            parent.convert(best)
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not head:
                setattr(parent, name, Plug(best(Projection.merged([child]))))


def _places_of(model: nn.Module, wanted: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(p, name) for p in model.modules() for name, child in p.named_children() if child is wanted]


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

    hooks = [layers[i].register_forward_hook(listen, with_kwargs=True) for layers, i in _decoder_layers(model)]
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
    """The lean twin of a layer that has the parts we know, None for any other."""
    children = dict(layer.named_children())
    attention, mlp = children.pop("self_attn"), children.pop("mlp", None)
    parts = dict(attention.named_children())
    projections = _take_linears(parts, ("q_proj", "k_proj", "v_proj", "o_proj"))
    head_norms = [norm for name in ("q_norm", "k_norm") if name in parts and (norm := _norm(parts.pop(name), team))]
    around = _around(children, team)
    spec = specs.get(_index(attention))
    if projections is None or parts or mlp is None or around is None or spec is None:
        return None
    return LeanLayer(
        spec,
        Projection.merged(projections[:3]),
        (head_norms[0], head_norms[1]) if len(head_norms) == 2 else None,
        Projection.merged(projections[3:]),
        _mlp(mlp, team),
        around,
    )


def _index(attention: nn.Module) -> int:
    index = attention.layer_idx
    return index if isinstance(index, int) else -1


def _take_linears(parts: dict[str, nn.Module], names: Sequence[str]) -> list[nn.Linear] | None:
    """Pop `names` from `parts`; None unless all are there and plain linear layers."""
    found = [parts.pop(name, None) for name in names]
    linears = [linear for linear in found if type(linear) is nn.Linear]
    return linears if len(linears) == len(names) else None


def _around(children: dict[str, nn.Module], team: Team | None) -> tuple[Around, Around] | None:
    """Llama's two norms, or Gemma's four; None for anything else."""
    norms = {name: _norm(child, team) for name, child in children.items()}
    first, second = norms.pop("input_layernorm", None), norms.pop("post_attention_layernorm", None)
    third, fourth = norms.pop("pre_feedforward_layernorm", None), norms.pop("post_feedforward_layernorm", None)
    if first is None or second is None or norms or (third is None) != (fourth is None):
        return None
    if third is None:
        return Around(first, None), Around(second, None)
    return Around(first, second), Around(third, fourth)


def _mlp(module: nn.Module, team: Team | None) -> Mlp | ForeignMlp:
    parts = dict(module.named_children())
    linears = _take_linears(parts, ("gate_proj", "up_proj", "down_proj"))
    activation = parts.pop("act_fn", None)
    name = activation_name(activation) if activation is not None else None
    if parts or linears is None or name is None:
        return ForeignMlp(module)
    return Mlp(Projection.merged(linears[:2]), Gate(name, team), Projection.merged(linears[2:]))


def _replace_norms(model: nn.Module, team: Team | None) -> None:
    """Those outside of lean layers: the last one, and all in layers that stay as they are."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            norm = _norm(child, team)
            if norm is not None:
                setattr(parent, name, Plug(norm))


def _norm(module: nn.Module, team: Team | None) -> Norm | None:
    """`module` as a `Norm` if it is an RMS norm: with its weight, or with 1 + its weight as in Gemma."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if "RMSNorm" not in type(module).__name__ or not isinstance(weight, Tensor) or weight.dim() != 1 or not eps:
        return None
    x = torch.linspace(-2, 3, 3 * len(weight), device=weight.device).view(3, -1).to(weight.dtype)
    expected: Tensor = module(x)
    for candidate in (weight.data, 1.0 + weight.data.float()):
        norm = Norm(candidate, eps, team)
        if (norm(x) - expected).abs().max() <= TOLERANCES[weight.dtype] * expected.abs().max():
            return norm
    return None

"""One GGUF file of the Llama family becomes a directory in the Hub's layout, without torch.

Weights are stored as bfloat16: half of float32 in bytes to read at every start, the dtype in which these models are
published, exact to widen to float32, and its rounding (2^-9) is far below the 4-bit noise that a quantised file
already has. A float32 and a bfloat16 engine thereby compute with the same weights.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from gguf.quants import dequantize, quantize

from baton.models.gguf_tokenizer import write_tokenizer
from baton.models.progress import Progress
from baton.models.source import SourceFailed, write_json

BF16_BYTES = 2
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Metadata:
    """The key-value part of a GGUF file."""

    def __init__(self, reader: GGUFReader) -> None:
        self._fields = reader.fields

    def get(self, key: str, default: Any = None) -> Any:
        field = self._fields.get(key)
        return default if field is None else field.contents()

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise SourceFailed(f"the GGUF file lacks {key}")
        return value


def convert(source: Path, into: Path, progress: Progress) -> None:
    """Writes config.json, generation_config.json, model.safetensors and the tokenizer's files into `into`.

    Raises `SourceFailed` for a file that is not a Llama-family GGUF or uses what is not handled here.
    """
    try:
        reader = GGUFReader(source)
    except (ValueError, IndexError) as error:
        raise SourceFailed(f"{source.name} is not a GGUF file: {error}") from error
    meta = Metadata(reader)
    config = llama_config(meta, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    write_json(into / "config.json", config)
    specials = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config[key] is not None}
    write_json(into / "generation_config.json", specials)
    write_tokenizer(meta, into)
    _write_weights(reader, config, into / "model.safetensors", progress)


def llama_config(meta: Metadata, tied: bool) -> dict[str, Any]:
    """The `config.json` of a `LlamaForCausalLM`."""
    architecture = meta.need("general.architecture")
    if architecture != "llama":
        raise SourceFailed(f"the GGUF file holds a {architecture} model; only llama is handled")
    if meta.get("llama.rope.scaling.type", "none") != "none":
        raise SourceFailed("the GGUF file scales its rotary embedding; that is not handled")
    heads = meta.need("llama.attention.head_count")
    hidden = meta.need("llama.embedding_length")
    head_dim = meta.get("llama.rope.dimension_count", hidden // heads)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(meta.need("tokenizer.ggml.tokens")),
        "hidden_size": hidden,
        "intermediate_size": meta.need("llama.feed_forward_length"),
        "num_hidden_layers": meta.need("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": meta.need("llama.context_length"),
        "rope_theta": _shortest(meta.get("llama.rope.freq_base", 10000.0)),
        "rms_norm_eps": _shortest(meta.need("llama.attention.layer_norm_rms_epsilon")),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "bfloat16",
    }


def _write_weights(reader: GGUFReader, config: dict[str, Any], target: Path, progress: Progress) -> None:
    """One tensor at a time, so that a large model needs little memory: the header tells all places beforehand."""
    total = BF16_BYTES * sum(int(tensor.n_elements) for tensor in reader.tensors)
    progress.stage("convert weights", total)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    header = _safetensors_header(reader)
    with target.open("wb") as file:
        file.write(header)
        for tensor in reader.tensors:
            values = _values(tensor)
            rotary = heads.get(tensor.name.removesuffix(".weight").rsplit(".", 1)[-1])
            if rotary is not None:
                values = unpermute(values, rotary)
            file.write(quantize(values, GGMLQuantizationType.BF16).tobytes())
            progress.reached(file.tell() - len(header))


def _safetensors_header(reader: GGUFReader) -> bytes:
    """Length (8 bytes, little-endian), then JSON, padded so that the data begins at a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in reader.tensors:
        end = offset + BF16_BYTES * int(tensor.n_elements)
        entries[_hub_name(tensor.name)] = {"dtype": "BF16", "shape": _shape(tensor), "data_offsets": [offset, end]}
        offset = end
    text = msgspec.json.encode(entries)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _shape(tensor: ReaderTensor) -> list[int]:
    """GGUF names the fastest dimension first."""
    return [int(n) for n in reversed(tensor.shape)]


def _values(tensor: ReaderTensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    values = dequantize(tensor.data, tensor.tensor_type)
    return np.ascontiguousarray(values.reshape(_shape(tensor)), dtype=np.float32)


def unpermute(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of a query or key projection from GGUF's order to the Hub's.

    Rotary embedding turns pairs of dimensions of a head. GGUF stores the two of a pair side by side (0, 1), (2, 3)
    ...; the Hub's models pair dimension i with i + head_dim / 2. Shape [heads * head_dim, hidden] stays.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def _hub_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`. Raises `SourceFailed` for unknown tensors."""
    match name.split("."):
        case [top, "weight"] if top in TOP:
            return f"{TOP[top]}.weight"
        case ["blk", layer, part, "weight"] if part in LAYER:
            return f"model.layers.{layer}.{LAYER[part]}.weight"
    if name == "rope_freqs.weight":
        raise SourceFailed("the GGUF file scales its rotary embedding; that is not handled")
    raise SourceFailed(f"the GGUF file holds a tensor {name} that no plain Llama model has")


def _shortest(value: float) -> float:
    """GGUF holds float32: 9.999999747e-06 was meant as 1e-05."""
    return float(str(np.float32(value)))

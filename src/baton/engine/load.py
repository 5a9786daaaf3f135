"""From a configuration to a runner: everything "auto" is decided here, and everything that cannot work is refused here.

EngineConfig ─▶ resolve ─▶ read config.json ─▶ load or invent weights ─▶ fuse, quantise ─▶ pool ─▶ Built
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError

from baton.base.config import EngineConfig
from baton.base.errors import ConfigError
from baton.base.layout import KVLayout
from baton.engine.attention import IMPLEMENTATION, Attention, PlainAttention, Spec, cpu
from baton.engine.fuse import convert_linears, fuse
from baton.engine.grammar import Grammars, NoGrammars
from baton.engine.kernels import Team, keep_freed_memory
from baton.engine.kv_pool import DTYPES, KVPool, pool_bytes
from baton.engine.model_runner import EagerForward, Forward, ModelRunner
from baton.engine.sampler import Sampler

GIB = 2**30
LAYER_KINDS = frozenset({"full_attention", "sliding_attention"})
DUMMY_SEED = 0


@dataclass(frozen=True, slots=True)
class Resolved:
    """`EngineConfig` with nothing left to guess."""

    path: Path
    device: torch.device
    dtype: str
    weight_dtype: str
    threads: int


@dataclass(frozen=True, slots=True)
class Shape:
    """What the KV pool and the scheduler must know of a model."""

    architectures: tuple[str, ...]
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int


@dataclass(frozen=True, slots=True)
class Built:
    """A runner, and what the process says about it."""

    runner: ModelRunner
    pool: KVPool
    layout: KVLayout
    num_pages: int
    max_model_len: int
    eos_token_ids: Sequence[int]
    vocab_size: int
    architectures: tuple[str, ...]
    weight_dtype: str
    device: str
    grammars: Grammars | NoGrammars


def build_runner(config: EngineConfig, memory: Callable[[int], memoryview] | None = None) -> Built:
    """Load the model, make the pool.

    On the CPU `memory(size)` gives the pool's writable buffer (None: private memory). Raises `ConfigError`.
    """
    resolved = resolve(config)
    settings = read_config(resolved.path)
    shape = shape_of(settings)
    torch.set_num_threads(resolved.threads)
    keep_freed_memory()
    model = load_model(settings, resolved, config.load_format)
    layout = kv_layout(shape, resolved, config)
    team = Team(resolved.threads) if resolved.device.type == "cpu" and resolved.dtype == "float32" else None
    check_windows(settings, fuse(model, layout, shape.heads, team))
    if team is not None:
        convert_linears(model, resolved.weight_dtype, team)
    num_pages = count_pages(config, layout, resolved.device)
    buffer = memory(pool_bytes(layout, num_pages)) if memory is not None and resolved.device.type == "cpu" else None
    spare = 0 if resolved.device.type == "cpu" else 1  # for the padding rows of CUDA graphs; in nobody's page table
    pool = KVPool(layout, num_pages + spare, buffer, resolved.device)
    eos = eos_token_ids(resolved.path, settings)
    grammars = _grammars(tokenizer_dir(config))
    sampler = Sampler(shape.vocab_size, eos, grammars)
    length = max_model_len(config, shape, layout, num_pages)
    attention, forward = _compute(config, model, pool, shape.heads, team, layout.pages_for(length))
    runner = ModelRunner(forward, attention, sampler, config.page_size, resolved.device)
    return Built(
        runner,
        pool,
        layout,
        num_pages,
        length,
        eos,
        shape.vocab_size,
        shape.architectures,
        resolved.weight_dtype,
        str(resolved.device),
        grammars,
    )


def _compute(
    config: EngineConfig, model: torch.nn.Module, pool: KVPool, heads: int, team: Team | None, most_pages: int
) -> tuple[Attention, Forward]:
    """The kernels for this device, and how the model is called with them."""
    forward = EagerForward(model)
    if team is not None and cpu.supports(pool, heads):
        return cpu.CpuAttention(pool, heads, team), forward
    if pool.pages.device.type == "cpu":
        return PlainAttention(pool, heads), forward
    from baton.engine.attention.cuda import CudaAttention
    from baton.engine.attention.graphs import GraphForward

    attention = CudaAttention(pool, heads)
    if not config.cuda_graphs:
        return attention, forward
    return attention, GraphForward(forward, attention, most_pages, spare_page=pool.num_pages - 1)


# --- decisions ---------------------------------------------------------------------------------------------------


def resolve(config: EngineConfig) -> Resolved:
    """Decide everything that is "auto". Reads the machine, changes nothing. Raises `ConfigError`."""
    path = Path(config.model).expanduser()
    if not (path / "config.json").is_file():
        raise ConfigError(f"model {config.model!r} is not a directory with a config.json; get it with `baton pull`")
    device = _device(config)
    on_cpu = device.type == "cpu"
    dtype = config.dtype if config.dtype != "auto" else "float32" if on_cpu else _own_dtype(path)
    weight_dtype = dtype if config.weight_dtype == "auto" else config.weight_dtype
    if weight_dtype != dtype and not (on_cpu and dtype == "float32"):
        raise ConfigError(
            f"weight_dtype {weight_dtype} needs dtype float32 on the CPU; here dtype is {dtype} on {device.type}: "
            "leave weight_dtype at auto"
        )
    return Resolved(path, device, dtype, weight_dtype, config.threads or _cores())


def _device(config: EngineConfig) -> torch.device:
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device is {config.device!r}; allowed: auto, cpu, cuda, cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {config.device!r}; allowed: auto, cpu, cuda, cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"device is {config.device!r}, but torch {torch.__version__} sees no GPU here")
        device = torch.device("cuda", config.base_gpu_id if device.index is None else device.index)
    return device


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _own_dtype(path: Path) -> str:
    own = read_config(path).dtype
    name = str(own).removeprefix("torch.")
    return name if name in DTYPES else "bfloat16"


# --- the model ---------------------------------------------------------------------------------------------------


def read_config(path: Path) -> Any:
    """The text model's Transformers config. Raises `ConfigError` for architectures that this engine cannot run."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise ConfigError(f"{path / 'config.json'} is not a config that Transformers knows: {error}") from error
    text = config.get_text_config(decoder=True)
    named = ", ".join(config.architectures or [config.model_type])
    if text.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(f"{named} is not a causal language model; this engine generates text")
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"{named} is stored quantised ({_method(config.quantization_config)}), which this engine does not read; "
            "take the unquantised model, with weight_dtype bfloat16 or int8 if memory is short"
        )
    foreign = sorted(set(getattr(text, "layer_types", None) or ()) - LAYER_KINDS)
    if foreign or getattr(text, "is_encoder_decoder", False):
        raise ConfigError(f"{named} has layers of kind {', '.join(foreign) or 'encoder'}; known: attention")
    if getattr(text, "num_kv_shared_layers", 0):
        raise ConfigError(f"{named} shares KV between layers, which this engine's pages cannot hold")
    return text


def _method(quantization: Any) -> str:
    settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
    return str(settings.get("quant_method", "unknown method"))


def shape_of(config: Any) -> Shape:
    heads = config.num_attention_heads
    return Shape(
        tuple(config.architectures or (config.model_type,)),
        config.num_hidden_layers,
        heads,
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
        config.vocab_size,
        config.max_position_embeddings,
    )


def load_model(config: Any, resolved: Resolved, load_format: str) -> torch.nn.Module:
    """The Transformers model, on its device, calling our attention. Raises `ConfigError`."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # the command line shows its own
    dtype = DTYPES[resolved.dtype]
    if load_format == "dummy":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(DUMMY_SEED)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=IMPLEMENTATION)
    else:
        if not list(resolved.path.glob("*.safetensors")):
            raise ConfigError(f"{resolved.path} has no *.safetensors; use load_format dummy for random weights")
        model = _read_weights(resolved.path, dtype)
    if not model._supports_attention_backend:
        raise ConfigError(f"{type(model).__name__} does not use Transformers' attention interface")
    if hasattr(model, "generation_config"):
        model.generation_config = None
    model = model.to(resolved.device).eval().requires_grad_(False)
    assert isinstance(model, torch.nn.Module)
    return model


def _read_weights(path: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=IMPLEMENTATION,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (RuntimeError, OSError, SafetensorError) as error:
        raise ConfigError(f"the weights in {path} do not fit its config.json: {error}") from error
    if report["missing_keys"]:
        raise ConfigError(f"the weights in {path} lack {', '.join(sorted(report['missing_keys'])[:5])}")
    return model


def check_windows(config: Any, specs: dict[int, Spec]) -> None:
    """Raises `ConfigError` if a layer that should see a window only does not say so when it calls for attention."""
    for layer, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind == "sliding_attention" and not specs[layer].window:
            raise ConfigError(f"layer {layer} of {config.model_type} hides its sliding window in a mask; not supported")


def eos_token_ids(path: Path, config: Any) -> tuple[int, ...]:
    """From generation_config.json, else config.json; sorted."""
    from transformers import GenerationConfig

    eos = config.eos_token_id
    if (path / "generation_config.json").is_file():
        own = GenerationConfig.from_pretrained(path, local_files_only=True).eos_token_id
        eos = eos if own is None else own
    if eos is None:
        return ()
    return tuple(sorted({eos} if isinstance(eos, int) else set(eos)))


def tokenizer_dir(config: EngineConfig) -> Path:
    return Path(config.tokenizer_path or config.model).expanduser()


def _grammars(path: Path) -> Grammars | NoGrammars:
    return Grammars(path) if (path / "tokenizer.json").is_file() else NoGrammars()


# --- the pool ----------------------------------------------------------------------------------------------------


def kv_layout(shape: Shape, resolved: Resolved, config: EngineConfig) -> KVLayout:
    fingerprint = fingerprint_of(resolved.path, config.load_format)
    return KVLayout(fingerprint, shape.layers, shape.kv_heads, shape.head_dim, config.page_size, resolved.dtype)


def fingerprint_of(path: Path, load_format: str) -> str:
    """Of config.json and of the weights: each file's header and the beginning of each of its tensors, so that a
    fine-tuned copy differs while gigabytes need not be read."""
    digest = xxhash.xxh3_128((path / "config.json").read_bytes())
    if load_format == "dummy":
        digest.update(b"dummy %d" % DUMMY_SEED)
        return digest.hexdigest()
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = stream.read(size)
            digest.update(header)
            for start in _tensor_starts(header):
                stream.seek(8 + size + start)
                digest.update(stream.read(4096))
    return digest.hexdigest()


def _tensor_starts(header: bytes) -> list[int]:
    import msgspec

    entries = msgspec.json.decode(header, type=dict[str, dict[str, Any]])
    return sorted(entry["data_offsets"][0] for name, entry in entries.items() if name != "__metadata__")


def count_pages(config: EngineConfig, layout: KVLayout, device: torch.device) -> int:
    """Pages of the pool, at least one. Raises `ConfigError` if not even that fits."""
    if config.kv_pages:
        return config.kv_pages
    wanted = config.max_total_tokens // layout.page_size
    if wanted and device.type == "cpu":
        return wanted
    if config.kv_cache_gb or device.type == "cpu":
        size = int((config.kv_cache_gb or 1.0) * GIB)
    else:
        free, total = torch.cuda.mem_get_info(device)
        size = int(free - total * (1 - config.mem_fraction_static))
    if size < layout.page_bytes:
        raise ConfigError(f"{max(size, 0)} bytes for the KV pool hold no page of {layout.page_bytes} bytes")
    fitting = size // layout.page_bytes
    return min(wanted, fitting) if wanted else fitting


def max_model_len(config: EngineConfig, shape: Shape, layout: KVLayout, num_pages: int) -> int:
    """Tokens of prompt and output together. Raises `ConfigError` if more is asked for than model or pool hold."""
    held = num_pages * layout.page_size
    if not config.max_model_len:
        return min(shape.max_positions, held)
    if config.max_model_len > shape.max_positions:
        raise ConfigError(f"max_model_len is {config.max_model_len}; the model knows {shape.max_positions} positions")
    if config.max_model_len > held:
        raise ConfigError(f"max_model_len is {config.max_model_len}; the KV pool holds {held} tokens")
    return config.max_model_len

"""What the operator can get wrong is refused with a sentence; what is "auto" is decided in one place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.base.config import EngineConfig
from baton.base.errors import ConfigError
from baton.engine.kv_pool import KVPool, pool_bytes
from baton.engine.load import build_runner, eos_token_ids, fingerprint_of, read_config, resolve, tokenizer_dir

from .drive import drive, engine_of, request, texts
from .models import make


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make("llama", tmp_path)


def change(path: Path, **values: Any) -> Path:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return path


def config(path: Path, **values: Any) -> EngineConfig:
    return EngineConfig(model=str(path), **{"kv_pages": 8, "threads": 1, **values})


def test_auto_on_a_cpu(llama: Path) -> None:
    resolved = resolve(config(llama, device="cpu", threads=0))
    assert (resolved.dtype, resolved.weight_dtype, resolved.device.type) == ("float32", "float32", "cpu")
    assert resolved.threads >= 1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"device": "tpu"}, "allowed: auto, cpu, cuda, cuda:N"),
        ({"device": "meta"}, "allowed: auto, cpu, cuda, cuda:N"),
        ({"max_model_len": 100_000}, "knows 512 positions"),
        ({"max_model_len": 500, "kv_pages": 2}, "holds 32 tokens"),
        ({"kv_pages": 0, "kv_cache_gb": 1e-6}, "hold no page"),
        ({"dtype": "bfloat16", "weight_dtype": "int8"}, "weight_dtype int8 needs dtype float32"),
    ],
)
def test_impossible_settings(llama: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_runner(config(llama, **values))


def test_the_pools_size_in_tokens(llama: Path) -> None:
    assert build_runner(config(llama, kv_pages=0, max_total_tokens=100)).num_pages == 6


def test_another_tokenizer_for_structured_output(llama: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "tokenizer"
    elsewhere.mkdir()
    assert tokenizer_dir(config(llama)) == llama
    assert tokenizer_dir(config(llama, tokenizer_path=str(elsewhere))) == elsewhere


def test_no_gpu_here(llama: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match="sees no GPU"):
        resolve(config(llama, device="cuda"))


def test_no_such_directory() -> None:
    with pytest.raises(ConfigError, match="baton pull"):
        resolve(config(Path("nowhere")))


def test_no_weights(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="load_format dummy"):
        build_runner(config(llama))
    assert build_runner(config(llama, load_format="dummy")).num_pages == 8


def test_weights_that_lack_a_tensor(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack .*model\.norm\.weight"):
        build_runner(config(llama))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "bert", "architectures": ["BertModel"]}, "attends in both directions"),
        ({"model_type": "never-heard"}, "not a config that Transformers knows"),
        ({"model_type": "mamba"}, "layers of kind"),
        ({"model_type": "t5"}, "not a causal language model"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "stored quantised \\(gptq\\)"),
        ({"layer_types": ["linear_attention", "full_attention", "full_attention"]}, "linear_attention"),
    ],
)
def test_models_we_cannot_run(llama: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_runner(config(change(llama, **values), load_format="dummy"))


def test_dummy_weights_are_the_same_every_time(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    answers = []
    for _ in range(2):
        torch.rand(3)  # whatever else drew numbers before
        built = build_runner(config(llama, load_format="dummy"))
        answers.append(texts(drive(engine_of(built), [request("a", [5, 6, 7], 12)])))
    assert answers[0] == answers[1]


def test_fingerprints_follow_config_and_weights(llama: Path) -> None:
    first = fingerprint_of(llama, "auto")
    assert fingerprint_of(llama, "auto") == first
    tensors = load_file(llama / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    second = fingerprint_of(llama, "auto")
    assert len({first, second, fingerprint_of(llama, "dummy")}) == 3
    assert fingerprint_of(change(llama, rope_theta=5.0), "auto") != second


def test_end_tokens_come_from_the_generation_config_first(llama: Path) -> None:
    settings = read_config(llama)
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    assert eos_token_ids(llama, settings) == (7, 9)
    (llama / "generation_config.json").unlink()
    assert eos_token_ids(llama, settings) == (2,)


def test_the_pool_lives_in_the_memory_it_is_given(llama: Path) -> None:
    buffers: list[bytearray] = []

    def memory(size: int) -> memoryview:
        buffers.append(bytearray(size))
        return memoryview(buffers[0])

    built = build_runner(config(llama), memory)
    assert len(buffers[0]) == built.layout.page_bytes * built.num_pages
    assert not any(buffers[0])
    drive(engine_of(built), [request("a", [5, 6, 7], 3)])
    assert any(buffers[0])


def test_memory_that_will_not_do(llama: Path) -> None:
    layout = build_runner(config(llama)).layout
    with pytest.raises(ConfigError, match="3 pages need"):
        KVPool(layout, 3, memoryview(bytearray(pool_bytes(layout, 2))))
    with pytest.raises(ConfigError, match="read-only"):
        KVPool(layout, 1, memoryview(bytes(pool_bytes(layout, 1))))


@pytest.mark.parametrize("weight_dtype", ["bfloat16", "int8"])
def test_reduced_weights_still_say_sensible_things(llama: Path, weight_dtype: str) -> None:
    """The same prompt by exact and by reduced weights: logprobs stay close (a random model has no firm opinions)."""
    said = []
    for each in ("auto", weight_dtype):
        built = build_runner(config(llama, weight_dtype=each))
        heard = drive(engine_of(built), [request("a", range(5, 50), 1, logprobs=0, prompt_logprobs=0)])["a"]
        said.append([entry.logprob for entry in heard[0].prompt_logprobs])
        assert built.weight_dtype == ("float32" if each == "auto" else weight_dtype)
    exact, reduced = (torch.tensor(each) for each in said)
    assert (exact - reduced).abs().mean() < 0.25


def test_bfloat16_activations_work_without_kernels(llama: Path) -> None:
    built = build_runner(config(llama, dtype="bfloat16"))
    assert built.layout.dtype == "bfloat16"
    assert len(texts(drive(engine_of(built), [request("a", range(5, 50), 9)]))["a"]) == 9

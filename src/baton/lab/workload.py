"""What is sent and when: a pure function of the configuration, the same for the same seed on every machine.

Arrivals, lengths and prompts are drawn from streams of their own, so that a change of the rate leaves the prompts as
they are: two servers, or two rates, see the same words.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from baton.base.errors import ConfigError
from baton.lab.config import BenchConfig, parse_rate
from baton.lab.traces import TraceRow, load_trace

ARRIVALS, LENGTHS, PROMPTS, BLOCKS, PREFIXES, WARMUP = range(6)
"""Names of the random streams; the numbers are part of what a seed means."""

MOONCAKE_BLOCK = 512
"""Tokens that one hash id of a Mooncake trace stands for."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request to be sent."""

    index: int
    due: float | None
    """Seconds after the start; None: as soon as the concurrency cap admits it (closed loop)."""
    prompt: tuple[int, ...] = field(repr=False)
    output_len: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of token counts; never below 1."""

    low: float
    high: float
    normal: bool = False
    """`low` is then the mean and `high` the standard deviation."""

    @classmethod
    def parse(cls, name: str, text: str) -> Lengths:
        """`512`, `256-1024` or `512~64`. Raises `ConfigError`."""
        match = re.fullmatch(r"\s*(\d+)\s*(?:([-~])\s*(\d+)\s*)?", text)
        if match is None:
            raise ConfigError(f'{name} is "{text}"; write 512, 256-1024 (uniform) or 512~64 (normal, mean~deviation)')
        first, kind, second = match.groups()
        if kind == "~":
            return cls(float(first), float(second), normal=True)
        low, high = float(first), float(second or first)
        if not 1 <= low <= high:
            raise ConfigError(f'{name} is "{text}"; lengths start at 1 and the second is not below the first')
        return cls(low, high)

    def draw(self, count: int, random: np.random.Generator) -> list[int]:
        if self.normal:
            values = random.normal(self.low, self.high, count)
        else:
            values = random.integers(int(self.low), int(self.high) + 1, count).astype(float)
        return [max(1, round(value)) for value in values.tolist()]


def plan(config: BenchConfig) -> list[Job]:
    """All requests of a run, in the order of their times. Raises `ConfigError` for a trace that cannot be read."""
    if config.dataset == "synthetic":
        rows, prompts = _synthetic(config)
    else:
        rows, prompts = _trace(config)
    dues = _arrivals(config, rows)
    jobs = [
        Job(index, due, prompt, _cut(row.output_len, config.length_scale, config.max_output_len))
        for index, (due, row, prompt) in enumerate(zip(dues, rows, prompts, strict=True))
    ]
    if config.duration:
        jobs = [job for job in jobs if job.due is None or job.due <= config.duration]
    return jobs


def warmup(config: BenchConfig) -> list[Job]:
    """Requests of the same shape with other words, to be sent before the measured ones and forgotten."""
    random = _stream(config, WARMUP)
    shapes = plan(config)[: config.warmup]
    return [
        Job(index, None, _ids(len(job.prompt), config.vocab, random), job.output_len)
        for index, job in enumerate(shapes)
    ]


def _stream(config: BenchConfig, *names: int) -> np.random.Generator:
    return np.random.default_rng([config.seed, *names])


def _cut(length: int, scale: float, longest: int) -> int:
    scaled = max(1, round(length * scale))
    return min(scaled, longest) if longest else scaled


def _ids(count: int, vocab: int, random: np.random.Generator) -> tuple[int, ...]:
    """Random tokens; the lowest ids are left out, most models keep their control tokens there."""
    return tuple(random.integers(min(256, vocab // 4), vocab, count).tolist())


def _own_ids(config: BenchConfig, index: int, count: int) -> tuple[int, ...]:
    """What no other request has. The count is part of the stream's name: with one seed, prompts of another length would
    begin alike, and a server that has seen the ones would find the others in its prefix cache."""
    return _ids(count, config.vocab, _stream(config, PROMPTS, index, count))


def _arrivals(config: BenchConfig, rows: Sequence[TraceRow]) -> list[float | None]:
    rate = parse_rate(config.rate)
    if rate is None:
        first = rows[0].arrived_at if rows else 0.0
        return [(row.arrived_at - first) / config.trace_speed for row in rows]
    if math.isinf(rate):
        return [None] * len(rows)
    if config.arrivals == "fixed":
        return [index / rate for index in range(len(rows))]
    gaps = _stream(config, ARRIVALS).exponential(1 / rate, len(rows))
    gaps[:1] = 0.0
    return list(np.cumsum(gaps).tolist())


def _synthetic(config: BenchConfig) -> tuple[list[TraceRow], list[tuple[int, ...]]]:
    random = _stream(config, LENGTHS)
    inputs = Lengths.parse("input_len", config.input_len).draw(config.requests, random)
    outputs = Lengths.parse("output_len", config.output_len).draw(config.requests, random)
    rows = [TraceRow(0.0, *pair) for pair in zip(inputs, outputs, strict=True)]
    return rows, list(_synthetic_prompts(config, inputs))


def _synthetic_prompts(config: BenchConfig, inputs: Sequence[int]) -> Iterator[tuple[int, ...]]:
    lengths = [_cut(length, config.length_scale, config.max_input_len) for length in inputs]
    longest = round(max(lengths, default=0) * config.shared_prefix)
    prefixes = [_ids(longest, config.vocab, _stream(config, PREFIXES, group)) for group in range(config.prefix_groups)]
    for index, length in enumerate(lengths):
        shared = round(length * config.shared_prefix)
        yield prefixes[index % config.prefix_groups][:shared] + _own_ids(config, index, length - shared)


def _trace(config: BenchConfig) -> tuple[list[TraceRow], list[tuple[int, ...]]]:
    rows = load_trace(config.dataset)[: config.requests]
    return rows, [_trace_prompt(config, row, index) for index, row in enumerate(rows)]


def _trace_prompt(config: BenchConfig, row: TraceRow, index: int) -> tuple[int, ...]:
    """A prompt of the recorded length; equal hash ids give equal blocks, so that prefixes repeat as they did."""
    length = _cut(row.input_len, config.length_scale, config.max_input_len)
    if not row.blocks:
        return _own_ids(config, index, length)
    size = max(1, round(MOONCAKE_BLOCK * config.length_scale))
    wanted = row.blocks[: -(-length // size)]
    tokens = [token for block in wanted for token in _ids(size, config.vocab, _stream(config, BLOCKS, block))]
    tokens += _own_ids(config, index, max(0, length - len(tokens)))
    return tuple(tokens[:length])

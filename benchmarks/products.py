"""Products of a decoder layer's weights: our panels beside oneDNN with packed weights and torch's own `F.linear`.

    python benchmarks/products.py [--threads 1] [--layers 30] [--rounds 20]

The four products of one layer of SmolLM2-135M in float32, over the weights of `--layers` layers in turn, so that no
cache holds them; the contenders in turns, the best of `--rounds`. GFLOP/s, and GB/s of weights read. The last line is
one JSON document.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from baton.engine.kernels import Team
from baton.engine.panels import PanelProduct

SHAPES = ((576, 960), (576, 576), (576, 3072), (1536, 576))
"""Inputs and outputs: query, key and value; output; gate and up; down."""
ROWS = (1, 2, 4, 6, 8, 12, 16, 64, 512)

Product = Callable[[Tensor], Tensor]


def contenders(weights: list[Tensor], threads: int) -> dict[str, list[Product]]:
    team = Team(threads)
    packed = [torch.ops.mkldnn._reorder_linear_weight(weight, 1024) for weight in weights]
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return {
        "panels": [PanelProduct(weight, None, None, team) for weight in weights],
        "oneDNN": [lambda x, w=weight: multiply(x, w, None, "none", [], "") for weight in packed],
        "F.linear": [lambda x, w=weight: F.linear(x, w) for weight in weights],
    }


def seconds(products: list[Product], inputs: list[Tensor]) -> float:
    started = time.perf_counter()
    for index, product in enumerate(products):
        product(inputs[index % len(inputs)])
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    weights = [torch.randn(outputs, inputs) for _ in range(arguments.layers) for inputs, outputs in SHAPES]
    each = contenders(weights, arguments.threads)
    size = sum(weight.numel() for weight in weights)
    result: dict[str, dict[int, float]] = {name: {} for name in each}
    for rows in ROWS:
        inputs = [torch.randn(rows, count) for count, _ in SHAPES]
        rounds = arguments.rounds if rows < 64 else 3
        best = dict.fromkeys(each, float("inf"))
        for _ in range(rounds):
            for name, products in each.items():
                best[name] = min(best[name], seconds(products, inputs))
        for name, time_taken in best.items():
            result[name][rows] = round(2 * rows * size / time_taken / 1e9, 1)
        line = "   ".join(
            f"{name} {result[name][rows]:6.1f} ({4 * size / best[name] / 1e9:4.1f} GB/s)" for name in each
        )
        print(f"{rows:4} rows   {line}")
    print(json.dumps({"threads": arguments.threads, "GFLOP/s": result}))


if __name__ == "__main__":
    with torch.inference_mode():
        main()

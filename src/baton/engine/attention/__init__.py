"""Attention over a paged KV cache: one socket (`base`), a kernel per kind of device behind it.

base        what a step is: rows, pages, positions; the `Attention` and `Step` protocols
plain       plain torch, any device and dtype: the yardstick the kernels are tested against
interface   the function that Transformers' models call
"""

from baton.engine.attention.base import Attention, HeadTransform, Rows, Spec, Step, lay_out
from baton.engine.attention.interface import IMPLEMENTATION
from baton.engine.attention.plain import PlainAttention

__all__ = ["IMPLEMENTATION", "Attention", "HeadTransform", "PlainAttention", "Rows", "Spec", "Step", "lay_out"]

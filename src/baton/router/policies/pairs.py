"""Turns for pairs: whoever takes turns on both sides meets everybody on the other side equally often."""

from __future__ import annotations

import math


def decode_turn(turn: int, prefills: int, decodes: int) -> int:
    """The decode side's turn for the pair of turn `turn`, to be taken modulo `decodes` (and `turn` modulo `prefills`).

    Equal or related numbers of workers would lock step: 2 x 2 would make two pairs, not four. So the decode side skips
    one turn after every `lcm` turns. Within such a cycle a pair occurs once if its indices agree modulo the greatest
    common divisor, and the skips lead through all remainders: `prefills * decodes` turns make every pair once.

    `turn` must count pairs only; a request that needs one side alone must not advance it.
    """
    return turn + turn // math.lcm(prefills, decodes)

"""Does an offer fit the prompt it is made for?"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq

import xxhash

from baton.base.layout import KVLayout
from baton.disagg.wire import Offer
from baton.engine.sequence import Sequence

MAX_PAGE = 1 << 31


def prompt_digest(tokens: Seq[int]) -> bytes:
    """XXH3-128 of the token ids as little-endian 32-bit integers."""
    return xxhash.xxh3_128_digest(array("i", tokens).tobytes())


def unacceptable(offer: Offer, sequence: Sequence, layout: KVLayout) -> str:
    """Why pages of this sequence must not go where the offer says; `""` if they may."""
    tokens = sequence.given_len
    if offer.prompt_len != tokens or offer.prompt_digest != prompt_digest(sequence.tokens[:tokens]):
        return (
            f"prefill and decode read different prompts ({tokens} tokens here, {offer.prompt_len} there): "
            "are tokenizer and chat template the same?"
        )
    if offer.prefix_len % layout.page_size or not 0 <= offer.prefix_len < tokens:
        return f"the offer's prefix of {offer.prefix_len} tokens is not a number of whole pages below {tokens}"
    missing = layout.pages_for(tokens) - offer.prefix_len // layout.page_size
    if len(offer.pages) != missing or len(set(offer.pages)) != missing:
        return f"the offer has {len(set(offer.pages))} different pages, the prompt needs {missing}"
    if not all(0 <= page < MAX_PAGE for page in offer.pages):
        return "the offer names pages that cannot exist"
    return ""

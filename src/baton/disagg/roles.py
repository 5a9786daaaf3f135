"""The roles of an engine whose prefill and decode are apart."""

from baton.disagg.decode import Decode
from baton.disagg.prefill import Prefill

__all__ = ["Decode", "Prefill"]

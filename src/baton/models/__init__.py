"""Getting models: a directory, a Hub id or a short name becomes a local directory with config, weights and tokenizer.

    from baton.models import resolve, RichProgress
    with RichProgress() as progress:
        path = resolve("smollm2-135m", progress=progress)

`resolve` is instant when the model is there. Nothing in this room imports torch.
"""

from __future__ import annotations

from baton.models.catalog import CATALOG, Model, WheelFile
from baton.models.progress import NoProgress, Progress, RichProgress
from baton.models.resolve import pull, resolve, resolve_tokenizer
from baton.models.source import PullFailed
from baton.models.store import Store, home

__all__ = [
    "CATALOG",
    "Model",
    "NoProgress",
    "Progress",
    "PullFailed",
    "RichProgress",
    "Store",
    "WheelFile",
    "home",
    "pull",
    "resolve",
    "resolve_tokenizer",
]

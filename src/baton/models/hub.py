"""A model from the Hugging Face Hub, through its own library: its token, its mirror and its cache settings apply."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm

from baton.models.progress import Progress
from baton.models.source import SourceFailed, missing

CONFIG_FILES = ["*.json", "*.jinja", "tokenizer.model"]
WEIGHT_FILES = ["model*.safetensors"]
Lacks = Callable[[Path], str]
"""What a directory lacks, as `source.missing`."""
REACH_SECONDS = 5.0
HTTP_ERROR: type[Exception] = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
"""Of the HTTP library that the Hub's library uses (which one depends on its version): broken connections."""


class HubSource:
    """Fills a directory of ours with the files of `hub_id`; what an interrupted pull has completed is kept."""

    def __init__(self, hub_id: str, endpoint: str | None = None) -> None:
        self.name = f"Hugging Face Hub, {hub_id}"
        self._hub_id = hub_id
        self._endpoint = endpoint

    def fetch(self, into: Path, progress: Progress) -> None:
        download(self._hub_id, True, progress, into=into, endpoint=self._endpoint)
        shutil.rmtree(into / ".cache", ignore_errors=True)  # the Hub library's book-keeping


def cached(hub_id: str, lacks: Lacks, revision: str | None = None) -> Path | None:
    """The directory of `hub_id` in the Hub library's own cache, if it is complete; touches no network."""
    try:
        path = Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return None if lacks(path) else path


def download(
    hub_id: str,
    weights: bool,
    progress: Progress,
    *,
    lacks: Lacks = missing,
    revision: str | None = None,
    into: Path | None = None,
    endpoint: str | None = None,
) -> Path:
    """Into `into`, or the Hub library's cache. Raises `SourceFailed` with the reason in one sentence."""
    progress.stage(f"download {hub_id} from the Hub")
    patterns = CONFIG_FILES + (WEIGHT_FILES if weights else [])
    try:
        path = snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=patterns,
            local_dir=into,
            etag_timeout=REACH_SECONDS,
            endpoint=endpoint,
            tqdm_class=_forwarding_to(progress),
        )
    except GatedRepoError as error:
        raise SourceFailed("access is gated: accept its terms on the Hub and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise SourceFailed("there is no such model (a private one needs HF_TOKEN)") from error
    except RevisionNotFoundError as error:
        raise SourceFailed(f'there is no revision "{revision}" of it') from error
    except HFValidationError as error:
        raise SourceFailed(f"not a valid Hub id: {error}") from error
    except LocalEntryNotFoundError as error:
        raise SourceFailed(f"not reachable: {_root(error)}") from error
    except (HTTP_ERROR, OSError) as error:
        raise SourceFailed((str(error) or repr(error)).splitlines()[0]) from error
    lack = lacks(Path(path))
    if lack:
        raise SourceFailed(f"the download is incomplete or not in a format that is read here: {lack}")
    return Path(path)


def _forwarding_to(progress: Progress) -> type[tqdm]:
    """A tqdm bar that draws nothing and reports the bytes it is told."""
    lock = threading.Lock()

    class Forward(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            self._counts_bytes = options.get("unit") == "B"
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            with lock:
                self.n += n or 0
            if self._counts_bytes:
                progress.reached(int(self.n), int(self.total) if self.total else None)
            return None

    return Forward


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error

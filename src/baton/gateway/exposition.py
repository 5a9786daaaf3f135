"""Metrics of several processes in one exposition: every sample gets the label `process`, nothing is added up.

Sums are the reader's to make: a sum made here would jump down whenever one process is restarted, and a rate over it
would take that for new requests.
"""

from __future__ import annotations

from collections.abc import Mapping


def merged(texts: Mapping[int, bytes]) -> bytes:
    """Prometheus text formats, by process. The samples of a family stay together, as the format wants it."""
    families: dict[str, tuple[list[str], list[str]]] = {}
    """Comments and samples, by family."""
    for process, text in sorted(texts.items()):
        comments: list[str] = []
        samples: list[str] = []
        for line in text.decode().splitlines():
            if line.startswith("# HELP "):
                family = line.split(" ", 3)[2]
                comments, samples = families.setdefault(family, ([], []))
            if not line.startswith("#"):
                samples.append(_labelled(line, process))
            elif line not in comments:
                comments.append(line)
    return "".join(f"{line}\n" for parts in families.values() for part in parts for line in part).encode()


def _labelled(sample: str, process: int) -> str:
    """`name{a="b"} 1.0` or `name 1.0`; a label's value may contain anything, a name may not."""
    head, brace, rest = sample.partition("{")
    if brace and " " not in head:
        return f'{head}{{process="{process}",{rest}'
    name, _, value = sample.partition(" ")
    return f'{name}{{process="{process}"}} {value}'

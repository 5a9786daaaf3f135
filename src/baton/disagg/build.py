"""From a configuration to a role."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from baton.base.clock import Clock
from baton.base.config import DisaggConfig
from baton.base.errors import ConfigError
from baton.base.layout import KVLayout
from baton.disagg.bootstrap import Inbox
from baton.disagg.decode import Decode
from baton.disagg.prefill import Prefill
from baton.disagg.receiver import Receiver
from baton.disagg.sender import Sender
from baton.engine.roles import Committer, Unified
from baton.engine.scheduler import Scheduler
from baton.engine.sockets import Role
from baton.transports.base import TRANSPORTS, Transport, create
from baton.transports.region import Region


class Station(Role, Protocol):
    """A role, and what the worker's front tells others about it."""

    bootstrap_port: int
    """Where decode workers find us; 0: nowhere."""
    transports: tuple[str, ...]


class Undivided(Unified):
    bootstrap_port = 0
    transports: tuple[str, ...] = ()


def build_role(
    config: DisaggConfig,
    scheduler: Scheduler,
    committer: Committer,
    region: Region | None,
    layout: KVLayout,
    instance: str,
    clock: Clock,
    wake: Callable[[], None],
    transports: Mapping[str, Transport] | None = None,
) -> Station:
    """The role that `config.mode` names. `wake` may be called from any thread; `poll` is due then.

    Raises `ConfigError` if a hand-off is wanted and there is no shareable memory, or the bootstrap port is taken.
    """
    if config.mode == "null":
        return Undivided(scheduler, committer)
    if region is None:
        raise ConfigError(
            f"disaggregation-mode {config.mode} needs a KV pool in shareable host memory; "
            "this engine's pool is on a device"
        )
    if transports is None:
        names = tuple(TRANSPORTS) if config.transport == "auto" else (config.transport,)
        transports = {name: create(name, region, wake) for name in names}
    inbox, offered = Inbox(wake), tuple(transports)
    if config.mode == "prefill":
        sender = Sender(config.bootstrap_host, config.bootstrap_port, layout, instance, transports, inbox)
        return Prefill(config, scheduler, committer, sender, layout, clock, offered)
    receiver = Receiver(layout, instance, transports, region, inbox)
    return Decode(config, scheduler, committer, receiver, layout, clock, offered)

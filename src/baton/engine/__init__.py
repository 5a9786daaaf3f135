"""Continuous batching over a paged KV cache. The engine sees token ids only; roles and runners are sockets."""

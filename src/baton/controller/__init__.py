"""Launches processes on this machine and keeps them running. Knows names, ports, cores and readiness; no tokens."""

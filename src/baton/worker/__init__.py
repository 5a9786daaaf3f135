"""The data plane's processes: a front (HTTP, text; no torch) and its engine, joined by one message channel."""

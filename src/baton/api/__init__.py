"""Text and wire formats: what clients say and read. No I/O but reading a model's files, no asyncio, no processes."""

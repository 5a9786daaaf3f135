"""The ground floor: errors, messages, configuration, hashing, time. No I/O, no torch, no asyncio."""

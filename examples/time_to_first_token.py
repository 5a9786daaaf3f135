"""What prefill/decode costs and buys, seen from outside: time to first token and gaps between tokens."""

import itertools
import os
import statistics
import time

from openai import OpenAI

client = OpenAI(base_url=os.environ.get("BATON_URL", "http://127.0.0.1:8000") + "/v1", api_key="none")
model = client.models.list().data[0].id

for words in (10, 100, 400):
    started = time.perf_counter()
    stream = client.completions.create(model=model, prompt="tea " * words, max_tokens=24, temperature=0, stream=True)
    times = [time.perf_counter() for chunk in stream if chunk.choices]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    print(f"{words:4} words: first token after {1e3 * (times[0] - started):6.0f} ms,", end=" ")
    print(f"then one every {1e3 * statistics.median(gaps):.1f} ms" if gaps else "and no more")

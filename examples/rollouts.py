"""Four samples of one prompt with token ids and logprobs, as an RL trainer wants them (SGLang's /generate)."""

import os

import httpx

url = os.environ.get("BATON_URL", "http://127.0.0.1:8000")
samples = httpx.post(
    f"{url}/generate",
    json={
        "text": "Once upon a time",
        "sampling_params": {"n": 4, "max_new_tokens": 12, "temperature": 0.8, "sampling_seed": 7},
        "return_logprob": True,
    },
    timeout=60,
).json()
for sample in samples:
    logprobs = [entry[0] for entry in sample["meta_info"]["output_token_logprobs"]]
    print(f"{sum(logprobs):8.2f}  {sample['output_ids']}  {sample['text']!r}")

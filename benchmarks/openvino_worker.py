"""Decode and prefill of OpenVINO GenAI on a GGUF file; run by a Python that has `openvino-genai`.

    PYTHON openvino_worker.py FILE THREADS PROMPT_TOKENS NEW_TOKENS STREAMS,...

Prints a line of JSON: tokens per second of all streams together for each number of streams, and of
one prompt's prefill. It imports nothing of Proa, which that Python need not have.
"""

import json
import random
import sys
import time

import numpy
import openvino
import openvino_genai

TOKENS = range(1000, 40_000)  # that prompts are drawn from; every model measured has more


def main() -> None:
    """Measure and print."""
    path, *numbers, streams = sys.argv[1:]
    threads, prompt_tokens, new_tokens = map(int, numbers)
    pipeline = openvino_genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads)
    rng = random.Random(0)

    def measure(num_streams: int, length: int) -> float:
        """Return the seconds that streams of some new tokens take together."""
        prompts = [rng.choices(TOKENS, k=prompt_tokens) for _ in range(num_streams)]
        ids = numpy.array(prompts, dtype=numpy.int64)
        inputs = [openvino.Tensor(ids), openvino.Tensor(numpy.ones_like(ids))]
        config = openvino_genai.GenerationConfig(
            max_new_tokens=length, ignore_eos=True, do_sample=False
        )
        start = time.perf_counter()
        pipeline.generate(openvino_genai.TokenizedInputs(*inputs), config)
        return time.perf_counter() - start

    measure(1, new_tokens)  # the first request is slower
    rates = {"prefill": prompt_tokens / measure(1, 1)}
    for num_streams in map(int, streams.split(",")):
        # The prompts take the time of the first token.
        seconds = -measure(num_streams, 1) + measure(num_streams, new_tokens)
        rates[str(num_streams)] = num_streams * (new_tokens - 1) / seconds
    print(json.dumps({name: round(rate, 1) for name, rate in rates.items()}))


if __name__ == "__main__":
    main()

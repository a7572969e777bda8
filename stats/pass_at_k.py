"""The share of tasks that one of k samples solves."""

import math


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Return how likely one of k samples passes, drawn without replacement from those of a task.

    This is the unbiased estimate of the probability for k fresh samples.

    Args:
        num_samples: of the task, at least k.
        num_passed: of these.
        k: at least 1.

    Raises:
        ValueError: an argument is out of range.

    Source: Chen et al., Evaluating large language models trained on code (2021), section 2.1.
    """
    if not 1 <= k <= num_samples or not 0 <= num_passed <= num_samples:
        raise ValueError(f"cannot estimate pass@{k} from {num_passed} of {num_samples} samples")
    return 1 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)

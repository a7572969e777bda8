"""Chat evaluation in the manner of MT-Bench: two-turn answers, judged by a model."""

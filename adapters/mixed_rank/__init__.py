"""Activation-aware mixed-rank compression: two thin factors for a matrix, a rank for each.

Source: Azizi, Nazemi and Pedram, "Memory-Efficient Vision Transformers: An Activation-Aware
Mixed-Rank Compression Strategy", arXiv 2402.06004. There is no public code; what the paper leaves
open is settled here and said where it is done.
"""

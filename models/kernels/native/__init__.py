"""The native executor: a C++ library without torch, and what hands it programs and batches."""

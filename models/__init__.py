"""The base decoder: an architecture as data, 4-bit linears and the kernels that run them."""

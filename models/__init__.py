"""The base decoder: an architecture described by data, 4-bit linears and the kernels that run them."""

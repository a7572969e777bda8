"""The native executor: a C++ library without torch, and what hands it programs and batches.

- `cpp`: the library's sources; `setup.py` compiles them into `_native.so` beside this file.
- `library`: loads it and refuses one built for other code; `sources`: the digest that tells.
- `structs`: the structures that both sides read, mirrored from `cpp/program.h`.
- `panels`, `memory`: weights as the kernels read them, and where they lie.
- `lowering`, `side`, `fork`: a program and both forms of side networks made of those structures.
- `executor`: one call for each step; `threads`: those of the library that take it.
- `picker`: the next tokens of many rows, in one call.
"""

"""Triton kernels, each beside the torch function that it equals.

`norm` (residual and RMSNorm), `rope` (rotary positions, and the cache's new keys and values), `swiglu`, `attend` (a
decode step's attention to pages and own tokens), `draw` (one token a row), `head` (log-probabilities over a
chunk of logits). Each module has a function for everyone,
which takes the kernel on a GPU that can run it and torch's operations everywhere else; both are one operation of
torch's to the dispatcher, so that a trace on the meta device counts a kernel as one.
"""

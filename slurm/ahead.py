"""eval/ahead.py for the local pool (pool.py), in a session of its own: what is sent to the process group of the command
that started the pool is to end neither this nor tasks that still save their state."""

import os

os.setsid()
import eval.ahead  # noqa: E402, F401

"""What the process that others are forked from reads, before any of them begins (eval/forked.py). For it alone: whoever
imports this ignores Ctrl-C from then on.

It never fails and leaves Ctrl-C to the others: a library that can't be read fails in the one that needs it, whose
log then says so.
"""

import contextlib
import importlib
import signal

from eval.forked import LIBRARIES  # of no module that they run: it would be read twice, which Python warns of

signal.signal(signal.SIGINT, signal.SIG_IGN)
for library in LIBRARIES:
    with contextlib.suppress(Exception, SystemExit):
        importlib.import_module(library)

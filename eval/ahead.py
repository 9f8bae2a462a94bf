"""What the process that the demo's parts are forked from reads, before any of them begins (eval/jobs.py).

It never fails and leaves Ctrl-C to the parts: a library that can't be read fails in the part that needs it, whose log
then says so.
"""

import contextlib
import importlib
import signal

# What takes longest to read of what trainings and evaluations use.
LIBRARIES = ("eval.engine", "megatron_avatar.training.loop", "megatron_avatar.training.replay_step",
             "transformers.models.qwen2_5_omni.modeling_qwen2_5_omni")  # fmt: skip

if __name__ != "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for library in LIBRARIES:
        with contextlib.suppress(Exception):
            importlib.import_module(library)

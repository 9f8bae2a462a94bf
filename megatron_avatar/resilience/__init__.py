"""How a run survives.

`checkpoint` and `saver` (state, written while training goes on), `replay_shards`, `stopping` (signals that all ranks
agree on), `watchdog` (a step that hangs), `attempts` (restarts without progress).
"""

"""How a run survives.

`checkpoint` with `index`, `shares` and `room`, and `saver` (state, written while training goes on), `replay_shards`,
`stopping` (signals that all ranks agree on), `watchdog` (a step that hangs), `attempts` (restarts without progress),
`ended` (exit statuses that launchers lose), `lock` (who works on a run), `queue` (Slurm, asked with patience).
"""

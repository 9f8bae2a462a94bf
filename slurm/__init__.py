"""Jobs: what sbatch scripts, sweep.py and reproduce.py share. Runs on a login node, without torch.

`launch` (what is checked before, layout, command), `snapshot` (the code of a job), `common.sh` with `starting`,
`preflight`, `meeting`, `ending` and `resubmit` (a job's life), `tasks`, `jobs` and `pool` (graphs of tasks, on Slurm or
this machine), `sweep`, `reproduce` and `table` (what a user types and sees), `local/` (a real Slurm on one machine).
"""

"""Jobs: what sbatch scripts, sweep.py and reproduce.py share. Runs on a login node, without torch.

What a user types: `submit` (behind the scripts that are typed), `eval_array` (behind eval.sh), `sweep`, `reproduce`
with `profile`, `graph` and `totals`, and what is seen: `page` and `table`. A job: `request` (what it asks Slurm for),
`launch` and `container` (what is checked before, and its command), `snapshot` (its code), `common.sh` with
`starting`, `preflight`, `meeting`, `ending` and `resubmit` (its life). Graphs of tasks, on Slurm or this machine:
`tasks`, `jobs`, `pool`. `local/` is a real Slurm on one machine.
"""

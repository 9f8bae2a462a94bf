"""Jobs: what sbatch scripts, sweep.py and reproduce.py share. Runs on a login node, without torch."""

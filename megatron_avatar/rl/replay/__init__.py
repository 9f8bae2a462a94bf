"""rl/replay."""

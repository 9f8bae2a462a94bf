"""rl/rewards."""

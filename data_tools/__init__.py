"""What a user runs to make, inspect and prepare data."""

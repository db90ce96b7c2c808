"""What the shipped configurations need on disk, made on the spot: `run.prepare` functions."""

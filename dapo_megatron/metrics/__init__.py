"""Names, files and console output of what a run measures."""

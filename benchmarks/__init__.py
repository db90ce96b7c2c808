"""Side-by-side measurements; each file is one command, results are in RESULTS.md."""

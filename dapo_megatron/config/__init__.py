"""The one configuration of a run: its schema, its files, its rules."""

"""Run a DAPO training: the controller's loop, Ray, and the run folder."""

"""The run's processes under Ray. The only room that imports ray."""

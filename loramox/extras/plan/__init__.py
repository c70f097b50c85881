"""The plan: memory and time of a run, before any weights are loaded, for every way to run it, and the fastest that fits.

Nothing is imported here: training takes its settings from `config`, and does not load what only a plan needs.
"""

"""The plan: memory and time of each combination of settings, before any weights are loaded, and the fastest that fits.

Nothing is imported here: training takes its settings from `config`, and does not load what only a plan needs.
"""

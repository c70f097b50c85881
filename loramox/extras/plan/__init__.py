"""What a run will take, before any weights are loaded: memory and time of every way to run it, and the fastest that fits.

Nothing is imported here: training takes its settings from `config`, and waits for nothing that only a plan needs.
"""

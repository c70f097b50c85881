"""Attempts to bring back what was forgotten."""

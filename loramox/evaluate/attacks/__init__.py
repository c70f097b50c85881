"""Attempts to recover the forgotten rows."""

"""Merge a forget adapter into its base's weights."""

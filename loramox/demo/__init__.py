"""The embedded world: everything loramox does, on made-up people and a model trained on the spot."""

from loramox.demo.job import demo

__all__ = ["demo"]

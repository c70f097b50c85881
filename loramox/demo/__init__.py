"""The demo: all of loramox on made-up people and a small model, trained on the spot."""

from loramox.demo.job import demo

__all__ = ["demo"]

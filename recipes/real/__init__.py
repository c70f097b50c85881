"""Unlearning on a pretrained chat model: see __main__.py."""

"""Rows to forget and to retain, and the batches made of them."""

"""Add an adapter to the weights of a model on disk, piece by piece, in a few MB of memory and without a GPU."""

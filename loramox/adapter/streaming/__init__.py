"""Add an adapter to the weights of a model that is in files, piece by piece, in the memory of a few MB and without a GPU."""

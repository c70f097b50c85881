"""Compare unlearning methods at equal budget, rank and number of settings: see __main__.py."""

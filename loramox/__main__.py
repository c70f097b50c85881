"""Entry point of `python -m loramox`, `torchrun -m loramox` and `accelerate launch -m loramox`."""

from loramox.cli import main

main()

"""`python -m loramox`, which is also what `torchrun -m loramox` and `accelerate launch -m loramox` start."""

from loramox.cli import main

main()

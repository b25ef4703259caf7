"""`python -m vitopt`, for `accelerate launch -m vitopt ...`."""

from vitopt.cli import main

main()

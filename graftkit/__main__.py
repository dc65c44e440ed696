"""`python -m graftkit`, and `torchrun -m graftkit` for several processes."""

from graftkit.cli import main

main()

"""`python -m graftkit`, and `torchrun -m graftkit` for several processes."""

from graftkit.cli.main import main

main()

"""`python -m distrain` is the command `distrain`."""

from distrain.cli import main

main()

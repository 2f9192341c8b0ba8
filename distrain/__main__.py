"""`python -m distrain` is the command `distrain`."""

from distrain.cli.main import main

main()

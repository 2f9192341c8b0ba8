"""Run the `distrain` command as `python -m distrain`."""

from distrain.cli.main import main

main()

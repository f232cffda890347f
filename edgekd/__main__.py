"""`python -m edgekd` is the same program as `edgekd`."""

from edgekd.cli import main

main()

"""`python -m peertune` is the command `peertune`."""

from peertune.cli import main

main()

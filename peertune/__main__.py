"""`python -m peertune` is the command `peertune`."""

from peertune.cli import main

if __name__ == "__main__":  # processes that this one starts import it by another name
    main()

"""`python -m heedful`: the command line, where a shell does not find `heedful`."""

from heedful.cli import main

if __name__ == "__main__":
    main()

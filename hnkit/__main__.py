"""`python -m hnkit`: the command line."""

from hnkit.cli import main

if __name__ == "__main__":
    main()

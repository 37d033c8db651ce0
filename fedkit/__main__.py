"""``python -m fedkit`` is ``fedkit``."""

from fedkit.cli.app import main

if __name__ == "__main__":
    main()

"""``python -m talos_fast`` is the ``talos-fast`` program."""

from talos_fast.cli import main

if __name__ == "__main__":
    main()

"""``python -m safeft``: the same as the ``safeft`` command."""

import sys

from safeft.commands import main

if __name__ == "__main__":
    sys.exit(main())

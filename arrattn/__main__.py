"""``python -m arrattn``: the command ``arrattn``."""

import sys

from arrattn.cli import main

if __name__ == "__main__":
    sys.exit(main())

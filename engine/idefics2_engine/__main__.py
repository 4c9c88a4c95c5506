"""Run the ``idefics2`` command with ``python -m idefics2_engine``."""

import sys

from idefics2_engine.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

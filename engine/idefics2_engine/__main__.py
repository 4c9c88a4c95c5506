"""``python -m idefics2_engine`` is the ``idefics2`` command."""

import sys

from idefics2_engine.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

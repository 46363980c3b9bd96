"""``python -m kvpoll`` is the command ``kvpoll``."""

import sys

from kvpoll.cli import main

if __name__ == "__main__":  # worker processes of `kvpoll run --seeds` import this file too
    sys.exit(main())

"""`python -m minirlhf.cli`: as the `minirlhf` command."""

import sys

from minirlhf.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

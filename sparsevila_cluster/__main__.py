"""`python -m sparsevila_cluster` is the command line."""

import sys

from sparsevila_cluster.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

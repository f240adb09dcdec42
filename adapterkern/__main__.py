"""`python -m adapterkern`: the same as the console script `adapterkern`."""

import sys

from adapterkern.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

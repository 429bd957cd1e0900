"""`python -m bench.tables`: make the tables of README.md and bench/README.md anew, or check them."""

import sys

from bench.tables.render import main

sys.exit(main())

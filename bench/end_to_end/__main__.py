import sys

from bench.end_to_end.command import main

sys.exit(main())

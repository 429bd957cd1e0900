"""The search: device orders and micro-batch sizes around two integer programs."""

import os

if os.path.expanduser("~") == "~":
    # Where there is no home folder, python-mip fails as it is imported: it looks for its settings there.
    os.environ["HOME"] = os.devnull
    try:
        import mip  # noqa: F401
    finally:
        del os.environ["HOME"]

"""The extension module llmpq._cpu, where it was built."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

extension: Any = None
with contextlib.suppress(ImportError):
    extension = importlib.import_module("llmpq._cpu")

"""Find the vital few of an ML system, spend only on them, and get a receipt."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"

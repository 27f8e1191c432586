"""Comparisons with other libraries, each in an environment of its own: some cap what we need."""

from __future__ import annotations

import nox

nox.options.sessions = []


@nox.session
def fbgemm(session: nox.Session) -> None:
    """Compare the fused rows with FBGEMM's table-batched embeddings, in speed and in the weights they give."""
    ours = ("numpy", "numba", "safetensors", "psutil", "pyarrow", "rich", "typer")
    session.install("-c", "constraints.txt", "torch", *ours)
    session.install("--no-deps", "fbgemm-gpu-cpu==1.8.0")
    session.install("--no-deps", "-e", ".")
    session.run("python", "tests/embeddings/peer_fbgemm.py")
    # It exits with 1 where a wanted ratio is missed, and says which.
    session.run("python", "benchmarks/embeddings/optimizer.py", *session.posargs, success_codes=[0, 1])


@nox.session
def models(session: nox.Session) -> None:
    """Wrap models of torch-rechub and DeepCTR-Torch, and train them beside their unwrapped twins."""
    ours = ("numpy", "numba", "safetensors", "psutil", "pyarrow", "rich", "typer", "scikit-learn")
    session.install("-c", "constraints.txt", "torch", *ours, "pandas", "tqdm", "requests")
    session.install("--no-deps", "torch-rechub==0.9.0", "deepctr-torch==0.3.0")
    session.install("--no-deps", "-e", ".")
    session.run("python", "tests/embeddings/peer_models.py")


@nox.session
def kvpress(session: nox.Session) -> None:
    """Compare our policies with kvpress' of the same names, which needs an older transformers: two environments."""
    peer = session.create_tmp() + "/peer"
    session.run("python", "-m", "venv", peer)
    theirs = f"{peer}/bin/python"
    wanted = ("torch==2.13.0", "transformers==5.2.0", "kvpress==0.5.5")
    session.run(theirs, "-m", "pip", "install", "--quiet", *wanted, external=True)
    session.install("-c", "constraints.txt", "-e", ".[generate,sample]")
    # It exits with 1 where ours is worse, and says in what.
    session.run("python", "benchmarks/generate/peers.py", "--peer", theirs, *session.posargs, success_codes=[0, 1])

"""The verb that writes a trained model for other programs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated

import typer

from vitalfew.cli import _flags as flag
from vitalfew.cli._output import Format, print_json, say

__all__ = ["export"]


def export(
    run_folder: Annotated[str, typer.Argument(metavar="RUN", help="The folder that `train` wrote.")],
    out: Annotated[str, typer.Option(help="A .pt2 file for the model.")],
    output: flag.Output = Format.text,
) -> None:
    """Write a trained model as a file that PyTorch runs alone."""
    from vitalfew.embeddings.exporting import export_model
    from vitalfew.embeddings.jobs import load_model
    from vitalfew.embeddings.tiered import TieredEmbeddings

    model, encoder, _ = load_model(run_folder)
    with model.tables if isinstance(model.tables, TieredEmbeddings) else nullcontext():
        export_model(model, out, lists=bool(encoder.schema.lists))
    if output is Format.json:
        print_json({"features": list(model.tables.features), "dense": list(encoder.schema.numeric), "out": out})
    else:
        say(f"wrote the model to {out}: torch.export.load runs it")

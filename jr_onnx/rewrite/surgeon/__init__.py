"""The same retrofit on a `gs.Graph`, for users of onnx-graphsurgeon (TensorRT, Polygraphy).

    import_model      Model -> gs.Graph, refused if onnx-graphsurgeon (gs) would lose something
    find_graph_sites  gs.Graph -> sites, found on gs's own objects without the engine's finder
    retrofit_graph    gs.Graph + jump -> a hardened copy of it

    graph --without weights--> exported --rewrite.retrofit--> its new nodes --> copy of the graph

The engine decides and writes the nodes, so forms, jumps, selections, refusals and site paths are
its own; this module only carries them over. The caller's graph is never changed. Its weights are
never loaded, converted or copied: the hardened graph holds the caller's own, so `values` edited in
place change in both. Where gs exports a model, an initializer used in a branch is written into
that branch too.

A `gs.Graph` has no place for the manifest, so there is no restore: keep the graph you came from.
The new nodes and values are named `jr_onnx/v1/...`, which gs keeps, and which is what a second
retrofit is refused by.
"""

from jr_onnx.rewrite.surgeon.adapter import (
    SurgeonRetrofit,
    find_graph_sites,
    import_model,
    retrofit_graph,
)
from jr_onnx.rewrite.surgeon.losses import DROPPABLE

__all__ = [
    "DROPPABLE",
    "SurgeonRetrofit",
    "find_graph_sites",
    "import_model",
    "retrofit_graph",
]

"""Blocks of transformers with the adapter, the residual add and the norm as one pass over memory.

    from adapterkern.integrations.transformers import fuse_norms
    fuse_norms(model)

It works on models as they are, with adapters of PEFT or of `adapterkern.insert`, and imports
neither library: blocks are recognised by their source.
"""

from adapterkern.integrations.transformers.fusing import Report, explain, fuse_norms, unfuse_norms

__all__ = ["Report", "explain", "fuse_norms", "unfuse_norms"]

"""A Hugging Face decoder seen as a chain: embedding, blocks, norm and head, found by structure."""

from sparsellm.chain.chain import Call, Chain, open_chain
from sparsellm.chain.linears import LinearView

__all__ = ["Call", "Chain", "LinearView", "open_chain"]

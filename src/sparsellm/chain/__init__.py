"""A Hugging Face decoder seen as a chain: embedding, blocks, norm and head, discovered from its structure."""

from sparsellm.chain.chain import Call, Chain, open_chain
from sparsellm.chain.streams import Feed, Stream
from sparsellm.chain.structure import LinearView

__all__ = ["Call", "Chain", "Feed", "LinearView", "Stream", "open_chain"]

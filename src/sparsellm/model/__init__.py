"""A Hugging Face decoder seen as a chain: embedding, blocks, norm and head, discovered from its structure."""

from sparsellm.model.chain import Call, Chain, open_chain
from sparsellm.model.streams import Feed, Stream
from sparsellm.model.structure import LinearView

__all__ = ["Call", "Chain", "Feed", "LinearView", "Stream", "open_chain"]

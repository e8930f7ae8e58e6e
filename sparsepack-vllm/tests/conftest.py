"""Tests of the interface take a stand-in of vLLM; those with the marker ``vllm`` start the real one in processes."""

from __future__ import annotations

import stand_in

stand_in.install()

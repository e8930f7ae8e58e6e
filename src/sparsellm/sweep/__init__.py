"""Refinement: kept weights are polished, zeros stay zero."""

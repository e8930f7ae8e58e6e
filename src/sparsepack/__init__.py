"""The packed format and its runtime: layout, codes, checkpoint, validation, modules, kernels."""

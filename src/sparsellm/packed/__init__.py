"""The packed format as data: layout, codes, checkpoint, validation. Modules and kernels are in ``runtime``."""

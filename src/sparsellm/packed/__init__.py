"""The packed format as data: layout, codes, checkpoint, validation. Modules and kernels stand in ``runtime``."""

"""How many inputs are pruned or rounded together, on a CPU and by the kernels of a GPU."""

PRUNED_TOGETHER = 128  # as in the paper of SparseGPT
ROUNDED_TOGETHER = 64  # their errors reach the inputs after them by one product, which then takes most of the time

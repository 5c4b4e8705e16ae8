"""The kernels, one file per operation: @triton.jit functions first, then the function that launches them."""

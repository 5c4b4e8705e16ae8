"""One module an operation: tensors and rules as the keyword arguments of ``ghl_kernels._cuda``."""

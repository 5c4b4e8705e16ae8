"""What the backends for GPUs share: how tensors look to a kernel, and what surrounds the kernels."""

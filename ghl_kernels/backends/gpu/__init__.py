"""What the backends for GPUs share: how tensors look to a kernel, and what surrounds the kernels."""

# Methods of operations.Operations that are a backend's functions.
OPERATION_NAMES = {
    *("compete", "competition_state", "winners", "linear_sums", "linear_pair", "conv_sums", "conv_pair"),
    *("linear_grad", "conv_grad"),
    *("linear_winner_sums", "conv_winner_sums", "conv_winner_pair"),
    *("delta", "gate", "gate_", "gate_all_", "learn_"),
}

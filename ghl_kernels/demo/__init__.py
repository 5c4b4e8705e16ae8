"""``python -m ghl_kernels demo``: one small CNN trained five ways on real images.

    backprop        the gradient alone
    GHL softmax     convolutions by Global-guided Hebbian Learning, softmax competition
    GHL k-WTA       the same, k winners at each position
    purely local    convolutions by `learn_`, no backward pass; then the read-out by backprop
    frozen random   convolutions stay as they were initialized; the read-out by backprop

The linear read-out is trained by backprop in all five. Per seed the five share the initial weights and
the order of the images; all of them use SGD with a cosine schedule over the same number of epochs.
"""

"""Every kernel compiled as each architecture would run it, without a GPU: tools/aot_check."""

"""Dense networks as data, so that kernels can take their losses, gradients and whole training runs at once."""

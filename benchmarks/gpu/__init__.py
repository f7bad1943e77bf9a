"""The benchmark of a GPU: operators against eager PyTorch and torch.compile, and whole models under CUDA graphs."""

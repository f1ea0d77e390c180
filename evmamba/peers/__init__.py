"""Other backbones that EfficientVMamba is compared with, on the same kernels: VMamba and Vision Mamba (Vim)."""

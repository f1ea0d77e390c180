"""Light state-space vision backbone EfficientVMamba."""

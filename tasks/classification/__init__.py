"""Image classification on folders of classes."""

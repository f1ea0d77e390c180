"""Second floor: classification, detection and segmentation with any backbone that yields a feature pyramid."""

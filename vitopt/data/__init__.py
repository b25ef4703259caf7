"""Images: folders, hub data sets, the built-in digits; preprocessing; augmentation."""

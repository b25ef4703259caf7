"""Less work for easy images: a first pass for all, a second for those of which it is not sure."""

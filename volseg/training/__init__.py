"""Training: from labelled regions of a volume to a bundle."""

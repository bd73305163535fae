"""Scores and pictures of finished segmentations."""

"""Predictor, accumulator and block processor: what one worker does with one block."""

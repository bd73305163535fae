"""Networks and bundles: architectures by name, folding for inference, and the folder that carries a trained model."""

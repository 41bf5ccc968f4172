"""Parameter groups: their saliency, which ones go, and taking them out of a model."""

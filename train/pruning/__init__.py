"""Parameter groups: saliency, selection, and removal from a model."""

"""What a model is: its shape, its tensors, its classes, and reading and writing its folder. Export enters here."""

"""Training on the grid of the file that ships."""

"""Several sizes from one run, the score that a size keeps, and the choice of a size for a device."""

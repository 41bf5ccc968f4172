"""The study: pruning-aware pretraining against its alternatives, at equal size and for equal tokens."""

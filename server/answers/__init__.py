"""Build answers, whole or as events, from the pieces that the engine generates."""

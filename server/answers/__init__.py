"""From a request to its answer, whole or as events."""

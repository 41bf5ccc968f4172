"""Running exported models: engines, sampling, chat. Imports no torch."""

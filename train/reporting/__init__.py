"""Records, plots and model card of a run."""

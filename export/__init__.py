"""From a checkpoint to a file that stock runtimes run, verified."""

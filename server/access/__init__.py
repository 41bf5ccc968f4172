"""Access control: checks of requests and limits of connections."""

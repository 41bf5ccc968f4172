"""Who may call, how often, and with what."""

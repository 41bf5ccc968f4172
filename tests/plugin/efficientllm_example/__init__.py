"""A criterion, an export target and an engine of somebody else's."""

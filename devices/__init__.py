"""Measuring artefacts on devices."""

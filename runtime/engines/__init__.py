"""Artefacts, the engines that run them behind one interface, and the scheduler of an engine."""

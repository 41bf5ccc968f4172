"""Errors, files, flags and commands for all five packages. Imports no other package of ours and no engine."""

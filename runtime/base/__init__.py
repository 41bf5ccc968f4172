"""What all five packages use: errors, files, flags, commands. Imports nothing of ours and no engine."""

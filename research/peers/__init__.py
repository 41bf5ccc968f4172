"""Other projects' exporters, run on a uniform checkpoint, so that their files can be measured beside ours."""

"""What `flamingo-ft env` prints: versions, hardware and missing extras, to be pasted into a bug report."""

"""Who is trimmed: all that differs between model families."""

"""The KV entries of trimmed prompts: memory, what is visible of it, and both together."""

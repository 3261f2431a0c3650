"""What is trimmed: how many visual tokens, which, and when. Knows nothing of transformers."""

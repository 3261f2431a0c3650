"""How visual tokens are trimmed, on tensors alone: reading a prompt, ranking and selecting its
tokens, the passes of prefill and decode, and what they keep in the KV cache."""

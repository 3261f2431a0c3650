"""Bad requests by the hundred, always the same ones, and the bounds that the server holds."""

"""The seam to transformers: the only folder that names its internals."""

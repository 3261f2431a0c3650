"""The model families, a file for each kind. A file here with a tuple ``FAMILIES`` is found by
itself (:mod:`st3.models.registry`)."""

"""The files of st3-tiny, in the folder ``model``: see ``st3.bundled_model()``."""

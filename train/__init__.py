"""Training of the bundled model st3-tiny, from scenes that this package draws itself.

Run from the project's root: ``python -m train.run``, ``python -m train.evaluate``,
``python -m train.export``.  Drawing needs the Noto Color Emoji font (Debian:
``fonts-noto-color-emoji``); the shipped weights and test images do not.
"""

"""The former place of :func:`st3.tools.common.errors.first_line`."""

from st3.tools.common.errors import first_line as first_line

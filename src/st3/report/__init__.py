"""What a trimmed run did, and the observer that notes it."""

from st3.report.report import KVSample, Report
from st3.report.reporter import Reporter

__all__ = ["KVSample", "Report", "Reporter"]

"""Does refusal hang on one neuron? The audit, and what it is compared with."""

from safeft.auditing.audit import audit
from safeft.auditing.result import AuditResult, Thresholds

__all__ = ["AuditResult", "Thresholds", "audit"]

"""The audit of a claim: probes of the defence, checks on records, and the verdict (docs/verdict.md)."""
